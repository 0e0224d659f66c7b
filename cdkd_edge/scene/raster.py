"""Everything this package asks of rasterio and GDAL: opening rasters and turning their errors into ours."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rasterio
from rasterio.errors import NotGeoreferencedWarning, RasterioError, RasterioIOError

from cdkd_edge.errors import SceneError

# GDAL's messages reach the user once, as the text of our errors, not also through logging's last resort.
logging.getLogger("rasterio").addHandler(logging.NullHandler())
# Scenes without georeference are welcome; their label maps have none either. (A filter set once: the
# context manager in warnings is not safe in threads.)
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)

_GDAL_OPTIONS = {
    "GDAL_PAM_ENABLED": "YES",
    # Read at once, a truncated PNG yields its compressed bytes as pixels, and no error (GDAL 3.10).
    "GDAL_PNG_WHOLE_IMAGE_OPTIM": "NO",
}

# What GDAL opens though it is no file: URLs, subdatasets (GPKG:file:table), files inside files.
_GDAL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_+.-]+:|/vsi")


@contextlib.contextmanager
def gdal(doing: str, cache_mb: int = 256) -> Iterator[None]:
    """A GDAL environment in which errors become :class:`SceneError`: "``doing`` failed: why".

    GDAL's default for its cache of blocks is a share of the memory, too much on a board and unbounded on a server.
    """
    with rasterio.Env(GDAL_CACHEMAX=cache_mb, **_GDAL_OPTIONS):
        try:
            yield
        except (RasterioError, RasterioIOError) as error:  # not a subclass before rasterio 1.4
            causes = []
            cause: BaseException | None = error
            while cause is not None:
                causes.append(str(cause))
                cause = cause.__cause__
            telling = [text for text in causes if "previous exception" not in text] or causes
            reason = " ".join(max(telling, key=len).split())
            raise SceneError(f"{doing} failed: {reason}") from None
        except UnicodeEncodeError:
            raise SceneError(f"{doing} failed: GDAL takes only names in UTF-8") from None


def is_gdal_name(name: str) -> bool:
    """Whether a name is one of GDAL's own and not a file's: a URL, a subdataset, a file inside an archive."""
    return _GDAL_NAME.match(name) is not None


def open_scene(path: str | Path) -> Any:
    """Open a raster for reading.

    Raises:
        SceneError: there is no such file, or GDAL does not know its format.
    """
    name = str(path)
    if not is_gdal_name(name) and not Path(name).is_file():
        raise SceneError(f"scene {name} {'is not a file' if Path(name).exists() else 'does not exist'}")
    try:
        with gdal(f"opening {name}"):
            return rasterio.open(name)
    except SceneError as error:
        if "not recognized" in error.message:
            raise SceneError(f"{name} is not a raster that GDAL can read") from None
        raise
