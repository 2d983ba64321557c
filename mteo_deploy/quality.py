"""Fréchet distance on the features of any network: what of a set of images differs from another set as a whole.

No network of ours: features come from a file in ONNX, of the user's own choosing, or from torch-fidelity's Inception, which
published figures are taken on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.arrays import npz
from mteo_deploy.engines.onnxruntime import session_options
from mteo_deploy.errors import EngineError, InputError, MissingPackageError
from mteo_deploy.images import to_uint8

Features = Callable[[NDArray[np.float32]], NDArray[np.floating]]
"""Images float32 ``[n, channels, height, width]`` in [-1, 1] to features ``[n, features]``."""

INCEPTION = "inception"


@dataclass(frozen=True)
class Statistics:
    """A Gaussian fitted to features: mean float64 ``[features]``, covariance float64 ``[features, features]``."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @classmethod
    def of(cls, features: NDArray[Any]) -> Statistics:
        """Fit features ``[count, features]``.

        Raises:
            InputError: for fewer than two rows, or features that are not finite.
        """
        wide = np.asarray(features, dtype=np.float64)
        if len(wide) < 2 or not np.isfinite(wide).all():
            found = f"{len(wide)} rows" if len(wide) < 2 else "NaN or infinity"
            raise InputError(f"expected finite features of 2 images or more; found {found}; look at the images")
        return cls(wide.mean(axis=0), np.atleast_2d(np.cov(wide, rowvar=False)))

    @classmethod
    def load(cls, path: Path) -> Statistics | None:
        """What an npz with arrays ``mu`` and ``sigma`` holds, as reference statistics are published; None for another npz.

        Raises:
            InputError: when their shapes do not go together, or they are no finite numbers.
        """
        with npz(path, "an npz of images or of reference statistics", "pass another --data") as arrays:
            if not {"mu", "sigma"} <= set(arrays.files):
                return None
            mean, covariance = (arrays[name] for name in ("mu", "sigma"))
        if not all(array.dtype.kind in "fiu" and np.isfinite(array).all() for array in (mean, covariance)):
            raise InputError(f"expected finite mu and sigma in {path}; found {mean.dtype} and {covariance.dtype} with others")
        mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise InputError(f"expected mu [n] and sigma [n, n] in {path}; found {mean.shape} and {covariance.shape}")
        return cls(mean, covariance)


def square_root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Symmetric square root of a positive semidefinite matrix; eigenvalues that rounding made negative count as zero."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared Fréchet distance of two Gaussians, ``|m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2))``.

    Heusel et al. 2017 (arXiv 1706.08500), eq. 6; closed form by Dowson & Landau 1982. The trace of the root is taken as
    the sum of the singular values of ``C_a^(1/2) C_b^(1/2)``, whose squares are the eigenvalues of ``C_a C_b``: no
    square root of an unsymmetric matrix, so nothing turns complex where features never fire and the product is singular.

    Raises:
        InputError: for features of different numbers.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(f"expected statistics of the same features; found {len(a.mean)} and {len(b.mean)} of them")
    difference = a.mean - b.mean
    root_trace = np.linalg.svd(square_root(a.covariance) @ square_root(b.covariance), compute_uv=False).sum()
    distance = difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root_trace
    return max(float(distance), 0.0)


def gap_closed(plain: float, mteo: float, reference: float) -> float | None:
    """Share of the distance between plain and reference that MTEO removes; None where there is none."""
    return (plain - mteo) / (plain - reference) if plain > reference else None


def features_of(name: str) -> Features:
    """The feature network called ``inception``, or the one in an ONNX file.

    Of an ONNX file the one input takes float32 images ``[n, channels, height, width]`` in [-1, 1], and the first output
    holds features, ``[n, ...]``. Inception (torch-fidelity) takes them as 8-bit RGB, gray images three times.

    Raises:
        InputError: for a name that is neither.
        MissingPackageError: when the package that runs it is not installed.
        EngineError: when ONNX Runtime does not open the file.
    """
    if name == INCEPTION:
        return _inception()
    path = Path(name)
    if path.suffix != ".onnx" or not path.is_file():
        raise InputError(f"expected --features inception, or a feature network as an .onnx file; found {name!r}")
    return _onnx(path)


def _onnx(path: Path) -> Features:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise MissingPackageError(f"{path} needs onnxruntime; run: pip install 'mteo-deploy[cpu]'") from None
    try:
        session = onnxruntime.InferenceSession(str(path), session_options(), providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        raise EngineError(f"expected a feature network that ONNX Runtime opens; {path}: {str(error).splitlines()[0]}") from None
    inputs, output = session.get_inputs(), session.get_outputs()[0].name
    if len(inputs) != 1:
        raise InputError(f"expected a feature network of one input in {path}; found {len(inputs)}")

    def features(images: NDArray[np.float32]) -> NDArray[np.floating]:
        try:
            found = session.run([output], {inputs[0].name: images})[0]
        except Exception as error:  # its exceptions have no common base
            raise InputError(f"{path} does not take images {list(images.shape)}: {str(error).splitlines()[0]}") from None
        return np.asarray(found).reshape(len(images), -1)

    return features


def _inception() -> Features:
    try:
        import torch
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError as error:
        raise MissingPackageError(f"--features inception needs {error.name}; run: pip install torch-fidelity") from None
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except OSError as error:
        raise InputError(
            f"torch-fidelity could not fetch Inception's weights ({error}); go online, or pass a feature network as .onnx"
        ) from None

    @torch.inference_mode()
    def features(images: NDArray[np.float32]) -> NDArray[np.floating]:
        pixels = to_uint8(images).transpose(0, 3, 1, 2)
        rgb = np.repeat(pixels, 3, axis=1) if pixels.shape[1] == 1 else pixels
        return network(torch.from_numpy(np.ascontiguousarray(rgb)))[0].numpy()

    return features
