"""Sub-commands of ``galray``, one module per noun; `galray.cli` mounts them."""
