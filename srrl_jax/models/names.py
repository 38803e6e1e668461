"""Which tensors of a Hugging Face checkpoint make up a parameter of the network."""

from srrl_jax.models.config import Qwen3Config


def tensor_names(path: tuple[str, ...], config: Qwen3Config) -> dict[str, tuple[int, ...]]:
    """The checkpoint tensors of the parameter at `path`, each with its index in the parameter.

    A layer's tensors are rows of a stack: `model.layers.3.mlp.up_proj.weight` is
    `layers.mlp.up_proj.weight[3]`.
    """
    name = ".".join(path)
    if path[0] == "lm_head":
        return {name: ()}
    if path[0] != "layers":
        return {f"model.{name}": ()}
    rest = name.partition(".")[2]
    return {f"model.layers.{layer}.{rest}": (layer,) for layer in range(config.num_hidden_layers)}
