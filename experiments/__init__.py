"""Entry points in a checkout: the pipeline for specific networks and data sets, plots and measurements."""

import importlib.util

_PACKAGES = (  # of the extra `job`; not imported here, because measurements of memory start from an empty process
    "PIL",
    "absl",
    "cv2",
    "grain",
    "jinja2",
    "matplotlib",
    "ml_collections",
    "orbax",
    "simplejpeg",
    "sklearn",
    "tensorflow_datasets",
    "tqdm",
)

if _missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
    raise SystemExit(f"error: experiments need {_missing[0]}; run `pip install ddnp_jax[job]`.")
