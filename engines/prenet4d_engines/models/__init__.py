"""The networks: denoiser, center, refine, ellipse. One file each, with the FP32 work around it."""

from prenet4d_engines.models.center import CenterNet
from prenet4d_engines.models.denoiser import Denoiser
from prenet4d_engines.models.ellipse import EllipseNet
from prenet4d_engines.models.refine import RefineNet

__all__ = ["CenterNet", "Denoiser", "EllipseNet", "RefineNet"]
