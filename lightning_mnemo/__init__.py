"""mnemo for Lightning: add `MnemoCallback` to a Trainer and nothing else.

With ``strategy="mnemo_ddp"`` and ``mnemo run`` a rank that dies is replaced while the others go on.
"""

from __future__ import annotations

try:
    import lightning.pytorch as _lightning  # noqa: F401
except ImportError as error:
    from mnemo.errors import MissingExtraError

    raise MissingExtraError(
        "lightning_mnemo needs Lightning, which is not installed: pip install 'mnemo-ft[lightning]'"
    ) from error

from lightning_mnemo.callback import MnemoCallback
from lightning_mnemo.strategy import MnemoDDPStrategy

__all__ = ["MnemoCallback", "MnemoDDPStrategy"]
