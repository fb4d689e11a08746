"""Where models registered by any version look for their loader: MLflow keeps this module's name with them."""

from lightning_glue.utils.quick_imports import quick_imports

with quick_imports():
    from lightning_glue.inference.pyfunc import _load_pyfunc as _load_pyfunc
