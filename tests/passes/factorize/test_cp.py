"""Alternating least squares: exact tensors are found, components stay bounded, and tensorly is no better."""

import pytest
import tensorly
import tensorly.decomposition
import torch

from graphopt.passes.factorize.cp import als
from graphopt.passes.factorize.cp_start import Expansion, noise
from tests.models import example


def build(modes):
    return torch.einsum("nar,nbr,ncr,ndr->nabcd", *modes)


def planted(rank, *sizes, batch=1):
    modes = [example(batch, n, rank, seed=i).double() for i, n in enumerate(sizes)]
    return build(modes)


def relative(tensor, modes):
    return ((tensor - build(modes)).flatten(1).norm(dim=1) / tensor.flatten(1).norm(dim=1)).square()


def start(tensor, rank):
    return Expansion(tensor).start(rank, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sizes", [(12, 10, 3, 3), (8, 9, 7, 1), (1, 9, 3, 3), (5, 6, 2, 4)])
def test_a_tensor_of_low_rank_is_found(sizes):
    tensor = planted(3, *sizes)
    found = als(tensor, start(tensor, 3), 300)
    # the ridge of 1e-4 of the energy leaves an error of its own
    assert float(found.errors) < 1e-3
    torch.testing.assert_close(found.errors, relative(tensor, found.modes), atol=1e-9, rtol=1e-5)


def test_a_batch_is_every_tensor_alone():
    tensors = planted(2, 1, 6, 3, 3, batch=4)
    together = als(tensors, start(tensors, 2), 30)
    for index in range(4):
        alone = als(tensors[index : index + 1], start(tensors[index : index + 1], 2), 30)
        assert float(alone.errors) == pytest.approx(float(together.errors[index]), abs=1e-3)


def test_starts_share_a_tensor():
    tensor = planted(4, 6, 7, 3, 3)
    generator = torch.Generator().manual_seed(1)
    starts = [start(tensor, 3), noise(tensor, 3, generator)]
    both = als(tensor, [torch.cat(pair) for pair in zip(*starts, strict=True)], 15)
    alone = als(tensor, starts[1], 15)
    assert float(both.errors[1]) == pytest.approx(float(alone.errors), rel=1e-2)
    torch.testing.assert_close(both.errors, relative(tensor, both.modes), atol=1e-9, rtol=1e-5)


def test_components_do_not_grow_against_each_other():
    """``a o a o b + a o b o a + b o a o a`` has rank 3 and approximations of rank 2 of any accuracy and any norm."""
    a, b = torch.eye(2, dtype=torch.float64)
    terms = [(a, a, b), (a, b, a), (b, a, a)]
    parts = [torch.einsum("i,j,k->ijk", *term) for term in terms]
    tensor = torch.stack(parts).sum(dim=0).reshape(1, 2, 2, 2, 1)
    found = als(tensor, noise(tensor, 2, torch.Generator().manual_seed(0)), 3000)
    norms = torch.stack([mode.norm(dim=1) for mode in found.modes]).prod(dim=0)
    assert float(found.errors) < 0.1
    assert float(norms.max()) < 10 * float(tensor.norm())


def test_the_expansion_is_orthogonal_and_complete():
    tensor = example(2, 5, 4, 3, 2).double()
    expansion = Expansion(tensor)
    tails = expansion.tails()
    assert tails.shape[1] - 1 == 5 * 6 * 2
    for rank in (1, 7, 30, 60):
        modes = expansion.start(rank, torch.Generator())
        torch.testing.assert_close(relative(tensor, modes), tails[:, rank], atol=1e-9, rtol=1e-6)
    assert float(tails[:, -1].max()) < 1e-12


def test_missing_terms_are_small_noise():
    tensor = planted(1, 2, 3, 1, 1)
    modes = start(tensor, 8)
    assert [mode.shape[2] for mode in modes] == [8] * 4
    assert float(relative(tensor, modes)) < 0.01
    assert all((mode.norm(dim=1) > 0).all() for mode in modes)


@pytest.mark.filterwarnings("ignore:Trying to compute SVD")  # tensorly's, for modes of 3
@pytest.mark.parametrize("rank", [4, 16])
def test_tensorly_finds_nothing_better(rank):
    tensor = (planted(6, 16, 12, 3, 3) + 0.5 * example(1, 16, 12, 3, 3, seed=9)).float()
    ours = float(als(tensor, start(tensor, rank), 200).errors)
    theirs = tensorly.decomposition.parafac(
        tensor[0].numpy(), rank, n_iter_max=200, init="svd", tol=1e-8, random_state=0
    )
    gap = tensorly.norm(tensor[0].numpy() - tensorly.cp_to_tensor(theirs))
    assert ours <= 1.03 * float(gap / tensor.norm()) ** 2
