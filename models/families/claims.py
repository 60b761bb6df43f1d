"""Where a configuration claims what the files contradict.

The files are facts and the configuration is a claim: what they hold decides, as far as it does in transformers, and the
difference is said. Knows names of tensors; neither their bytes nor where they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from shoal.models.errors import CorruptCheckpoint
from shoal.partition.amounts import counted

from .tensors import Names

Same = Callable[[str, str], bool]
"""Whether two tensors, both there, hold the same bytes."""

# A decoder's names begin so. Others that a checkpoint puts before them are found by its embedding.
_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
_EMBED, _HEAD = "embed_tokens.weight", "lm_head.weight"
_NAMED = 3  # of the tensors that have no place, so many are named


def all_differ(one: str, other: str) -> bool:
    return False


class Ends(NamedTuple):
    """Names of the tensors at both ends of a decoder, and what its names begin with. `head` is that of `embed` if they
    are tied."""

    prefix: str
    embed: str
    head: str
    warnings: tuple[str, ...] = ()
    spare: str = ""  # a stored head that equals the embedding

    @property
    def tied(self) -> bool:
        return self.head == self.embed


def find_ends(tensors: Collection[str], claims_tied: bool, origin: str, same: Same) -> Ends:
    """Where embedding and head are, whatever `tie_word_embeddings` of the file `origin` says. Without files, only
    the claim counts."""
    prefix = _prefix(tensors)
    embed = prefix + _EMBED
    if not tensors:
        return Ends(prefix, embed, embed if claims_tied else _HEAD)
    heads = [re.sub(r"(^|\.)model\.(language_model\.)?$", r"\1", prefix) + _HEAD, _HEAD]
    if not claims_tied:
        heads.append(prefix + _HEAD)
    head = next((name for name in heads if name in tensors), "")
    said = f"{origin}: tie_word_embeddings is {str(claims_tied).lower()}, but the files"
    if head and embed not in tensors and claims_tied:
        return Ends(prefix, head, head, (f"{said} hold {head} and no {embed}; it serves as both",))
    if not head:
        saying = (
            ()
            if claims_tied or embed not in tensors
            else (f"{said} hold no {heads[0]}; {embed} serves as both",)
        )
        return Ends(prefix, embed, embed, saying)
    if not claims_tied:
        return Ends(prefix, embed, head)
    if same(embed, head):
        return Ends(prefix, embed, embed, spare=head)
    return Ends(prefix, embed, head, (f"{said} hold {head} with values of its own; it is used",))


def claimed_biases(
    names: Names, tensors: Collection[str], claimed: Mapping[str, bool], layers: int, origin: str
) -> tuple[frozenset[str], tuple[str, ...]]:
    """(the biases, warnings). `claimed`: role → whether the configuration says that there is one. A bias that no layer
    has is none, and one that the configuration does not know is not used."""
    kept: set[str] = set()
    without: list[str] = []
    for role, template in {role: name for of in names.values() for role, name in of.items()}.items():
        if claimed.get(role):
            if not tensors or any(template.format(layer=i) in tensors for i in range(layers)):
                kept.add(role)
            else:
                without.append(template.format(layer=0))
    if not without:
        return frozenset(kept), ()
    said = f"{origin}: asks for biases that the files do not hold ({_some(without)}); they count as zero"
    return frozenset(kept), (said,)


def check_layers(tensors: Iterable[str], pattern: str, count: int, claim: str) -> int:
    """How many layers the tensors have, if there are `count` at least. `pattern` finds a layer's number in the names of
    its tensors; `claim` names the file and the key that say `count`. Raises CorruptCheckpoint if there are fewer."""
    there = {int(found[1]) for name in tensors if (found := re.match(pattern, name))}
    if there and max(there) + 1 < count:
        raise CorruptCheckpoint(f"{claim}={count}, but the files hold {counted(max(there) + 1, 'layer')}")
    return max(there, default=count - 1) + 1


def unused(
    tensors: Collection[str], used: Collection[str], prefix: str, count: int, origin: str
) -> tuple[str, ...]:
    """A warning if the decoder of a Hugging Face checkpoint has tensors that its configuration gives no place."""
    own = (f"{prefix}layers.", f"{prefix}norm.", f"{prefix}embed", "lm_head.", "score.")
    buffers = ("rotary_emb.inv_freq", "masked_bias")
    left = [
        name for name in tensors if name not in used and name.startswith(own) and not name.endswith(buffers)
    ]
    numbered = re.compile(re.escape(prefix) + r"layers\.(\d{1,6})\.")
    beyond = [name for name in left if (found := numbered.match(name)) and int(found[1]) >= count]
    said: list[str] = []
    if beyond:
        layers = check_layers(beyond, numbered.pattern, 0, origin)
        said.append(
            f"{origin}: num_hidden_layers={count}, but the files hold {counted(layers, 'layer')}; "
            "the others are not used"
        )
    if rest := set(left) - set(beyond):
        said.append(
            f"{origin}: gives {counted(len(rest), 'tensor')} of the files no place ({_some(rest)}); "
            f"{'it is' if len(rest) == 1 else 'they are'} not used"
        )
    return tuple(said)


def _prefix(tensors: Collection[str]) -> str:
    known = next((prefix for prefix in _PREFIXES if prefix + _EMBED in tensors), None)
    if known is not None:
        return known
    first = "layers.0.input_layernorm.weight"
    others = sorted(
        (name.removesuffix(end) for name in tensors for end in (_EMBED, first) if name.endswith("." + end)),
        key=len,
    )
    return others[0] if others else _PREFIXES[0]


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    shown = (name if name.isprintable() else ascii(name) for name in ordered[:_NAMED])
    return ", ".join(name[:100] for name in shown) + (", …" if len(ordered) > _NAMED else "")
