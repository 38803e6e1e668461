"""Which tensors of a Hugging Face checkpoint make up a parameter of the network."""

from srrl_jax.models.config import Qwen3Config


def tensor_names(path: tuple[str, ...], config: Qwen3Config) -> dict[str, tuple[int, ...]]:
    """The checkpoint tensors of the parameter at `path`, each with its index in the parameter.

    A layer's tensors are rows of a stack, those of an expert rows of a row:
    `model.layers.3.mlp.experts.7.up_proj.weight` is `moe_layers.mlp.experts.up_proj.weight[2, 7]`
    where layer 0 alone is without experts. Names, and one tensor for each expert, are what published
    checkpoints have and `save_pretrained` of transformers 5.23 writes.
    """
    name = ".".join(path)
    if path[0] == "lm_head":
        return {name: ()}
    if path[0] not in ("layers", "moe_layers"):
        return {f"model.{name}": ()}
    rest = name.partition(".")[2]
    layers = [i for i, experts in enumerate(config.has_experts) if experts == (path[0] == "moe_layers")]
    if "experts" not in path:
        return {f"model.layers.{layer}.{rest}": (row,) for row, layer in enumerate(layers)}
    return {
        f"model.layers.{layer}.{rest.replace('experts', f'experts.{expert}')}": (row, expert)
        for row, layer in enumerate(layers)
        for expert in range(config.moe.num_experts)
    }
