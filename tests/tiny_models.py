"""What several test files make: models of transformers whose forgotten parameters show, and a place for a server to listen at."""
import socket


def perturbed(model, also=()):
    """The model in float32 for evaluation, its 1-D parameters, and those whose names hold one of `also`, moved, so that a swapped or forgotten one shows."""
    import torch
    model, generator = model.eval().float(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or any(word in name for word in also):
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]
