"""Inputs of the CUDA C++ kernels' tests, their float64 values, and the error limits."""

import torch

#: rounding of the bf16 outputs themselves is 1.66e-3 (relative Frobenius error on random data)
BF16 = 1.8e-3
FP32 = 2e-5


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    few = expected.numel() < 1000  # then the mean of the rounding errors scatters
    return float((got.double() - expected).norm() / expected.norm()) * (0.7 if few else 1.0)


def correctly_rounded(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Share of bfloat16 values that are the rounded float64 value: sees an error far below the rounding itself."""
    return float((got == expected.to(torch.bfloat16)).double().mean())


class Site:
    """Random inputs of every kernel, and what float64 makes of the values that the kernels are given."""

    def __init__(self, n: int, c: int, m: int, device: str = "cuda", seed: int = 0) -> None:
        generator = torch.Generator(device=device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, generator=generator)

        big_n = n * (n + 2)
        self.n, self.c, self.m, self.big_n = n, c, m, big_n
        self.x, self.g, self.y = (normal(m, n, c).bfloat16() for _ in range(3))
        self.gu, self.f = normal(m, c).bfloat16(), normal(m, c).bfloat16()
        self.phi = normal(big_n, n * c) / (n * c) ** 0.5
        self.coef, self.proj = normal(m, big_n).abs(), normal(m, big_n)
        self.alpha, self.bias = normal(3), normal(big_n)
        width = 1 << (n + 1).bit_length()
        padded = max(16, 1 << (big_n - 1).bit_length())
        self.mix = torch.zeros(m, n, width, device=device)
        self.mix[:, :, : n + 2] = normal(m, n, n + 2)
        self.mix[:, :, n + 1] = self.mix[:, :1, n + 1]  # rc belongs to the token
        dz = normal(m, big_n)
        self.dz = torch.zeros(m, 2, padded, device=device, dtype=torch.bfloat16)
        self.dz[:, 0, :big_n] = dz.bfloat16()
        self.dz[:, 1, :big_n] = (dz - dz.bfloat16().float()).bfloat16()

    def streams_backward(self) -> tuple[torch.Tensor, torch.Tensor]:
        x, g, gu, mix = self.x.double(), self.g.double(), self.gu.double(), self.mix.double()
        dz, n = self.dz.double().sum(1)[:, : self.big_n], self.n
        dx = (
            torch.einsum("tio,toc->tic", mix[:, :, :n], g)
            + mix[:, :, n, None] * gu[:, None]
            + mix[:, :, n + 1, None] * x
        )
        dx = dx + (dz @ self.phi.double()).view_as(x)
        return dx, dz.T @ x.flatten(1)

    def write_backward(self, dx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        n, g = self.n, dx.double()
        h_post = 2 * torch.sigmoid(
            self.alpha[1].double() * self.proj[:, n : 2 * n].double() + self.bias[n : 2 * n].double()
        )
        df = torch.einsum("to,toc->tc", h_post, g)
        post = torch.einsum("toc,tc->to", g, self.f.double())
        res = torch.einsum("toc,tic->toi", g, self.y.double()).flatten(1)
        return df, torch.cat([torch.zeros_like(post), post, res], dim=1)

    def check_boundary(
        self, out: torch.Tensor, u: torch.Tensor | None, slabs: torch.Tensor, squares: torch.Tensor
    ) -> None:
        n, coef, stored = self.n, self.coef.double(), out.double()
        h_res = coef[:, 2 * n :].view(self.m, n, n)
        expected = h_res @ self.x.double() + coef[:, n : 2 * n, None] * self.f.double()[:, None]
        assert error(out, expected) < BF16
        assert correctly_rounded(out, expected) > 0.98
        assert error(slabs.double().sum(0), stored.flatten(1) @ self.phi.double().T) < FP32
        assert error(squares.double().sum(0), stored.square().sum((1, 2))) < FP32
        if u is not None:
            assert error(u, torch.einsum("to,toc->tc", coef[:, :n], stored)) < BF16
