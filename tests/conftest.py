"""Being here, this file puts `tests/` on the import path, so that the helper modules beside it can be imported."""
