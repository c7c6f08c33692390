"""The closed forms of `peers.py` against the peers' own packages: seven steps, T = 3, at most 1e-6 apart in fp32.

Random and SVD bases are read from the package's state and handed over, so what is compared is the rule. That an SVD
basis is the truncated SVD of the gradient is checked on the way, up to the columns' signs. LDAdam and GoLore have no
package to install; they, and all the others, are held against identities in test_peers_identities.py.
"""

import importlib
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from . import peers
from .reference import align_signs, svd_basis
from .samples import SHAPES, gradients, normal

RANK, EVERY, LR = 4, 3, 1e-2
each_shape = pytest.mark.parametrize(("rows", "cols"), SHAPES)
each_decay = pytest.mark.parametrize("weight_decay", [0.0, 0.1])


def package(name: str) -> ModuleType:
    return pytest.importorskip(name, reason=f"{name.split('.')[0]} is not installed", exc_type=ImportError)


def start(rows: int, cols: int) -> Tensor:
    """A weight of a real one's size, so that 1e-6 is well above fp32 noise; exact in fp32, as are the gradients."""
    return (0.1 * normal(rows, cols, seed=1)).float()


def samples(rows: int, cols: int) -> list[Tensor]:
    return [grad.float() for grad in gradients(rows, cols, 7)]


def run(optimizer: torch.optim.Optimizer, p: Tensor, basis: Callable[[], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the package's weight and basis after each step."""
    path, bases = [], []
    for grad in samples(*p.shape):
        p.grad = grad.clone()
        optimizer.step()
        path.append(p.detach().clone())
        bases.append(basis())
    return path, bases


def stored_basis(optimizer: torch.optim.Optimizer, p: Tensor) -> Callable[[], Tensor]:
    """Return a reader of the projector's basis as (d, r); for m >= n the packages keep its transpose."""

    def read() -> Tensor:
        stored = optimizer.state[p]["projector"].ortho_matrix
        return (stored.T if p.shape[0] >= p.shape[1] else stored).double().clone()

    return read


def assert_same_path(theirs: list[Tensor], ours: list[Tensor]) -> None:
    assert len(theirs) == len(ours) == 7
    for their, our in zip(theirs, ours, strict=True):
        assert our.dtype == torch.float64
        assert (their.double() - our).abs().max() <= 1e-6
    assert (ours[-1] - start(*ours[-1].shape)).abs().max() > 1e-3


def closed_form(method: Callable[..., peers.Run], rows: int, cols: int, **options: object) -> list[Tensor]:
    grads = [grad.double() for grad in samples(rows, cols)]
    return method(start(rows, cols).double(), grads, rank=RANK, lr=LR, every=EVERY, **options)[0]


def assert_svd_bases(bases: list[Tensor], rows: int, cols: int) -> None:
    """Bases of steps 1, 4, 7 are the leading singular vectors of those gradients and stay until the next."""
    for step, basis in enumerate(bases):
        grad = samples(rows, cols)[step - step % EVERY].double()
        expected = svd_basis(grad.T if rows >= cols else grad, RANK)
        assert (align_signs(expected, basis) - basis).abs().max() <= 1e-4  # fp32 vectors of nearby singular values


@each_shape
@each_decay
@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_fira_is_the_package_fira(rows: int, cols: int, weight_decay: float, scale: float) -> None:
    """Fira 1.0.2. It declares tensorly as a dependency and never imports it: nothing more to install here."""
    p = torch.nn.Parameter(start(rows, cols))
    group = {"params": [p], "rank": RANK, "update_proj_gap": EVERY, "alpha": scale, "proj_type": "std"}
    optimizer = package("fira").FiraAdamW([group], lr=LR, weight_decay=weight_decay, no_deprecation_warning=True)
    path, bases = run(optimizer, p, stored_basis(optimizer, p))
    assert_svd_bases(bases, rows, cols)
    options = {"scale": scale, "weight_decay": weight_decay, "basis_at": lambda number: bases[EVERY * number]}
    assert_same_path(path, closed_form(peers.fira, rows, cols, **options))


@each_shape
@each_decay
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_apollo_is_the_package_apollo_torch(rows: int, cols: int, weight_decay: float, granularity: str) -> None:
    """apollo-torch 1.0.3, scale_front False: in a parameter group it would be ignored (PEERS B4)."""
    p, scale = torch.nn.Parameter(start(rows, cols)), 4.0
    group = {"params": [p], "rank": RANK, "update_proj_gap": EVERY, "scale": scale, "proj_type": "std"}
    group |= {"proj": "random", "scale_type": granularity}
    optimizer = package("apollo_torch").APOLLOAdamW([group], lr=LR, weight_decay=weight_decay)
    path, bases = run(optimizer, p, stored_basis(optimizer, p))
    options = {"scale": scale, "weight_decay": weight_decay, "basis_at": lambda number: bases[EVERY * number]}
    assert_same_path(path, closed_form(peers.apollo, rows, cols, granularity=granularity, **options))


@each_shape
@each_decay
def test_galore_adafactor_is_the_package_galore_torch(rows: int, cols: int, weight_decay: float) -> None:
    """galore-torch 1.0. proj_type "std": "reverse_std" projects back on the wrong side where r >= m (PEERS B1)."""
    p, scale = torch.nn.Parameter(start(rows, cols)), 0.25
    group = {"params": [p], "rank": RANK, "update_proj_gap": EVERY, "scale": scale, "proj_type": "std"}
    fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False, "beta1": None}
    optimizer = package("galore_torch").GaLoreAdafactor([group], lr=LR, weight_decay=weight_decay, **fixed)
    path, bases = run(optimizer, p, stored_basis(optimizer, p))
    assert_svd_bases(bases, rows, cols)
    options = {"scale": scale, "weight_decay": weight_decay}
    handed = closed_form(peers.galore_adafactor, rows, cols, basis_at=lambda number: bases[EVERY * number], **options)
    assert_same_path(path, handed)
    assert_same_path(path, closed_form(peers.galore_adafactor, rows, cols, **options))  # signs do not matter here


@each_shape
@each_decay
def test_flora_is_the_package_flora_opt(rows: int, cols: int, weight_decay: float) -> None:
    """flora-opt 0.0.3. scale_parameter False and beta1 given: its default is plain Adafactor (PEERS B7)."""
    package("flora_opt")
    package("bitsandbytes"), package("accelerate")  # without them flora_opt.Flora is None and the module not importable
    flora_opt = importlib.import_module("flora_opt.optimizers.torch.flora")
    p = torch.nn.Parameter(start(rows, cols))
    fixed = {"scale_parameter": False, "relative_step": False, "beta1": 0.9, "clip_threshold": 1.0}
    optimizer = flora_opt.Flora([p], lr=LR, rank=RANK, kappa=EVERY, weight_decay=weight_decay, **fixed)

    def basis() -> Tensor:
        """Return P (d, r) drawn again from the seed in the state, as the package does it whenever it needs it."""
        left, right = flora_opt.split_seed(optimizer.state[p]["seed"])
        if rows < cols:
            return flora_opt.stable_randn((RANK, rows), seed=left).T.double() / RANK**0.5
        return flora_opt.stable_randn((cols, RANK), seed=right).double() / RANK**0.5

    first = basis()
    path, bases = run(optimizer, p, basis)
    drawn = [first, bases[2], bases[5]]  # new ones at the end of steps 3 and 6
    options = {"beta1": 0.9, "weight_decay": weight_decay, "basis_at": lambda number: drawn[number]}
    assert_same_path(path, closed_form(peers.flora, rows, cols, **options))
