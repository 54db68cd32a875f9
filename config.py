"""The configuration of a LLaMA: the sizes of its network, and the positions that it was trained with.

Does not: read config.json itself (checkpoint.py), or build a network (model.py).

    config = Config.from_hf("llama-7b")
    plan = config.plan("mesa", n=4096)
"""
from dataclasses import dataclass, field

from checkpoint import config_fields
from frequencies import positive, whole
from positions import Method, merged


@dataclass
class Config:
    """The fields of config.json that shape a LLaMA, under their Hugging Face names, and what its positions are."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    qkv_bias: bool = False                           # q, k and v have a bias whatever attention_bias says (Qwen2)
    qk_norm: bool = False                            # every head's q and k are normed before they turn (Qwen3)
    bos_token_id: int | None = 1
    eos_token_id: tuple[int, ...] = (2,)
    dtype: str = "float32"                           # as stored
    train_len: int = 2048                            # L: original_max_position_embeddings, else max_position_embeddings
    freq: str = "rope"                               # the frequencies it was trained with, a row of FREQUENCIES
    freq_params: dict = field(default_factory=dict)  # and their parameters
    rotary_dim: int | None = None                    # how many channels of a head turn; None: all
    interleaved: bool = False                        # pairs of channels (2p, 2p + 1), not (p, p + rotary_dim/2)
    layer_methods: tuple[str, ...] = ()              # of each layer, see checkpoint.own_method; (): all attend as asked
    bits: int | None = None                          # our key quantization: weights stored in 8 or 4 bits; None: plain
    cache_dtype: str | None = None                   # how a cache holds keys and values, see cache.py; None: plain
    cosine_attention: float | None = None            # our key: logits are this times the cosine of q and k (CosScale)
    first_head: int = 0                              # where a process has some of the heads alone (shards.py): which,
    all_heads: int | None = None                     # and how many there are; None: it has all

    @staticmethod
    def from_hf(path, train_len=None):
        """The Config of a checkpoint folder; train_len overrides L. ValueError names what is missing or unsupported."""
        fields = config_fields(path, train_len)
        try:
            return Config(**fields)
        except ValueError as error:
            raise ValueError(f"{path}/config.json: {error}") from None

    def __post_init__(self):
        """ValueError for sizes that no model can have."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "max_position_embeddings", "train_len"):
            whole(name, getattr(self, name))
        widths = (self.vocab_size, self.hidden_size, self.intermediate_size, self.num_attention_heads * self.head_dim)
        if max(widths) > 2 ** 28:  # numbers of weights would overflow
            raise ValueError(f"a width of {max(widths)} is more than any model has")
        for name in ("rms_norm_eps", "rope_theta"):
            positive(name, getattr(self, name))
        special = self.eos_token_id if self.bos_token_id is None else (self.bos_token_id, *self.eos_token_id)
        for token in special:
            if whole("a token id", token, least=0) >= self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads {self.num_key_value_heads} does not divide num_attention_heads "
                             f"{self.num_attention_heads}")

        if len(self.layer_methods) not in (0, self.num_hidden_layers):
            raise ValueError(f"layer_methods {self.layer_methods} are not of {self.num_hidden_layers} layers")

    @property
    def is_governed(self):
        """Whether there is a layer that attends by the method asked for: rotary, and seeing all keys."""
        return not self.layer_methods or "" in self.layer_methods

    def plan(self, method=None, *, n, i=None, j=None, freq=None, attn_scale=None, **params):
        """The Plan of a method for this model; queries i and keys j default to a whole prompt of n tokens.
        Layers with a method of their own do not count here; Llama.plan adds theirs.

        method: a name, a text like "mesa:first=16", or a Method; None is what config.json says. The keywords are
        settings of the method. See positions.Method and positions.make_plan.
        """
        return Method.of(method, freq, attn_scale, **params).plan(self, n, i, j)

    def plans(self, method, n, i=None, j=None):
        """{"": the Plan of a Method, text: that of the layers with this method of their own}, of what layers there are;
        the arguments are those of plan."""
        methods = {own: Method.parse(own) if own else method for own in self.layer_methods or ("",)}
        return {own: each.plan(self, n, i, j) for own, each in methods.items()}

    def later_keys(self, method, n, now):
        """The keys before index `now` that a cache has to keep, of a Method for a prompt of n tokens and of the layers
        with a method of their own: disjoint, rising intervals [(start, stop)]. See Method.later_keys."""
        methods = [Method.parse(own) if own else method for own in set(self.layer_methods or ("",))]
        return merged([interval for each in methods for interval in each.later_keys(self, n, now)])
