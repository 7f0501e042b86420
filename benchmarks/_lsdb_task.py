"""hats-import and lsdb on a Parquet file, for a Python that has them: ``FILE FOLDER`` → JSON.

The file becomes a HATS catalogue; the stars' states are then computed into memory (``cpu``), or written as a
second catalogue (``cpu_written``). Runs without galray: `benchmarks.catalog` calls it with the interpreter
that ``--lsdb-python`` names.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path


def usage(client) -> float:
    """CPU seconds of this process and of the workers so far."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime + sum(client.run(time.process_time).values())


def states(frame):
    """Galactocentric states of a partition by astropy."""
    import astropy.units as u
    import numpy as np
    from astropy.coordinates import CartesianDifferential, Galactocentric, SkyCoord

    names = ["x", "y", "z", "vx", "vy", "vz"]
    if not len(frame):  # lsdb asks with no rows, on which SkyCoord velocities fail
        return frame.assign(**{name: np.zeros(0) for name in names})
    place = SkyCoord(
        ra=frame["ra"].to_numpy() * u.deg,
        dec=frame["dec"].to_numpy() * u.deg,
        distance=(1.0 / frame["parallax"].to_numpy()) * u.kpc,
        pm_ra_cosdec=frame["pmra"].to_numpy() * u.mas / u.yr,
        pm_dec=frame["pmdec"].to_numpy() * u.mas / u.yr,
        radial_velocity=frame["radial_velocity"].to_numpy() * u.km / u.s,
    )
    center = Galactocentric(
        galcen_distance=8.122 * u.kpc,
        z_sun=20.8 * u.pc,
        galcen_v_sun=CartesianDifferential([12.9, 245.6, 7.78] * u.km / u.s),
    )
    found = place.transform_to(center)
    values = [found.x, found.y, found.z, found.v_x, found.v_y, found.v_z]
    return frame.assign(**{name: value.value for name, value in zip(names, values, strict=True)})


def main() -> None:
    file, folder = Path(sys.argv[1]), Path(sys.argv[2])
    import lsdb
    import pyarrow.parquet as pq
    from dask.distributed import Client
    from hats_import.catalog.arguments import ImportArguments
    from hats_import.pipeline import pipeline_with_client

    rows = pq.read_metadata(file).num_rows
    with Client(
        n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=str(folder)
    ) as client:
        os.sync()  # what was written before is not this one's work
        begin, start = usage(client), time.perf_counter()
        arguments = ImportArguments(
            output_artifact_name="stars",
            output_path=folder,
            input_file_list=[file],
            file_reader="parquet",
            ra_column="ra",
            dec_column="dec",
            progress_bar=False,
            tmp_dir=folder,
        )
        pipeline_with_client(arguments, client)
        imported = time.perf_counter() - start
        import_cpu = usage(client) - begin
        found = lsdb.read_hats(folder / "stars").map_partitions(states).compute()
        wall, cpu = time.perf_counter() - start, usage(client) - begin
        begin = usage(client)
        lsdb.read_hats(folder / "stars").map_partitions(states).write_catalog(folder / "states")
        written = import_cpu + usage(client) - begin
    result = {"wall": wall, "import_wall": imported, "cpu": cpu, "cpu_written": written}
    result |= {"rows": rows, "stars": len(found)}
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
