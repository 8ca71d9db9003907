"""What a run wrote down -> the part, head and dim of every row of every parameter."""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from .labels import ACTIVE, Attention, Log, Scan, distinct, row, token
from .places import Columns, Labels, Place, Roles, Table
from .vectors import Vectors, in_batches, numbered


class Reader:
    """Reads a log. `tables` maps the first element of a parameter to its table."""

    def __init__(self, log: Log, places: Sequence[Place]) -> None:
        self.log = log
        self.places = sorted(places, key=lambda place: place.first)
        self.starts = np.array([place.first for place in self.places])
        self.tables: dict[str, Table] = {}
        self.heads_of_out: dict[int, dict[int, int]] = {}
        self.queries: dict[int, str] = {}
        self.scanned: dict[tuple[str, str], list[tuple[int, ...]]] = {}
        self.head_of_scan: dict[int, int] = {}
        for number, seen in sorted(enumerate(log.attentions), key=lambda pair: not pair[1].softmax):
            if seen.v is not None and not seen.by_heads:
                self._attention(number, seen)
        for seen in log.attentions:
            if seen.v is None or seen.by_heads:
                self._choice(seen)
        for scan in log.scans:
            self._scan(scan)
        self._drop_outputs()
        self._gates()
        self._latents()
        self._mixed()
        self._gated_units()
        self._short_convolutions()
        self._biases()

    def place(self, element: int) -> Place:
        return self.places[int(np.searchsorted(self.starts, element, side="right")) - 1]

    def table(self, place: Place) -> Table:
        return self.tables.setdefault(place.name, Table(place))

    def _assign(self, element: int, part: str, head: int, dim: int) -> None:
        place = self.place(element)
        self.table(place).add(place.row(element), part, head, dim)

    def _attention(self, number: int, seen: Attention) -> None:
        assert seen.v is not None and seen.q_of is not None and seen.k_of is not None and seen.pairs is not None
        q, k, v = (Vectors(x) for x in (seen.q, seen.k, seen.v))
        if q.by_channel and k.by_channel and not seen.softmax:
            return
        if not (q.heads and k.heads and v.heads):
            return
        kv_of = _served(q, k, seen.pairs)
        if not kv_of and len(k.heads) > 1:  # keys of several parameters, as of a summary beside the tokens: the first one tells
            owners = [{self.place(element).name for element in head} for head in k.heads]
            k.keep([owner == owners[0] for owner in owners])
            kv_of = _served(q, k, seen.pairs)
            if not kv_of:
                return
            met = {v.head_of[i] for i, b in enumerate(seen.k_of.flatten().tolist()) if 0 <= b < len(k.head_of) and k.head_of[b] >= 0}
            v.keep([head in met for head in range(len(v.heads))])
        self._straighten(q, k)
        of_q, of_k, of_v = q.head_of, k.head_of, v.head_of
        q_numbers = numbered([kv_of.get(i, 0) for i in range(len(q.heads))])
        met_v: dict[int, int] = {}
        for i, b in enumerate(seen.k_of.flatten().tolist()):
            if 0 <= b < len(of_k) and i < len(of_v) and of_v[i] >= 0 and of_k[b] >= 0:
                met_v.setdefault(of_v[i], of_k[b])
        v_numbers = numbered([met_v.get(i, i) for i in range(len(v.heads))])
        of_out, out_numbers = (of_v, v_numbers) if seen.recurrent else (of_q, q_numbers)
        self.heads_of_out[number] = {i: out_numbers[h] for i, h in enumerate(of_out) if h >= 0}
        self.queries[number] = self.place(q.heads[0][0]).name
        split = self._names_of_split(k)
        for head in k.heads[:1] if split is not None else ():
            for element in head:
                self.table(self.place(element)).latent = True
        self._enter("q", q, q_numbers, split)
        self._enter("k", k, list(range(len(k.heads))), split)
        self._enter("v", v, v_numbers, None)
        for part, labels in seen.others.items():
            for i, element in enumerate(row(labels).flatten().tolist()):
                if element >= 0 and i in self.heads_of_out[number]:
                    self._assign(element, part, self.heads_of_out[number][i], 0)

    def _choice(self, seen: Attention) -> None:
        """Scores that weigh no values: of a pointer, or of an indexer that chooses what to attend to, with many queries to a key."""
        q, k = Vectors(seen.q), Vectors(seen.k)
        if q.by_channel or k.by_channel or not (q.heads and k.heads):
            return
        q_labels, k_labels = seen.q, seen.k
        if len(k.heads) > len(q.heads):
            q, k, q_labels, k_labels = k, q, k_labels, q_labels
        owners = {self.place(element).name for head in (*q.heads, *k.heads) for element in head}
        met = {(a, b) for ours, theirs in zip(in_batches(q, q_labels), in_batches(k, k_labels), strict=True) for a in ours for b in theirs}
        kv_of = dict(met)
        if owners & self.tables.keys() or len(kv_of) != len(met):
            return
        self._straighten(q, k)
        self._enter("q", q, numbered([kv_of.get(i, 0) for i in range(len(q.heads))]), None)
        self._enter("k", k, list(range(len(k.heads))), None)
        for name in owners:
            self.tables[name].chooses = True

    def _straighten(self, q: Vectors, k: Vectors) -> None:
        """Numbers the dims of q and k in the order of their rows, when one order does so for every head of both.

        Scores do not change when the dims of q and k are moved alike, as some code does before it rotates.
        """
        if len(q.heads[0]) != len(k.heads[0]):
            return
        for heads in (q.heads, k.heads):
            order = self._in_rows(heads[0])
            if all(self._in_rows([head[i] for i in order]) == list(range(len(order))) for head in (*q.heads, *k.heads)):
                for vectors in (q, k):
                    vectors.heads = [tuple(head[i] for i in order) for head in vectors.heads]
                return

    def _in_rows(self, elements: Sequence[int]) -> list[int]:
        """The order of dims that sorts the elements of each parameter, each parameter keeping its places."""
        owners = [self.place(element).name for element in elements]
        order = list(range(len(elements)))
        for owner in set(owners):
            slots = [i for i, name in enumerate(owners) if name == owner]
            for slot, i in zip(slots, sorted(slots, key=elements.__getitem__), strict=True):
                order[slot] = i
        return order

    def _names_of_split(self, k: Vectors) -> list[str] | None:
        """MLA: keys put together from a part per head and one shared by all; the name of each dim's part, or None."""
        owners = [self.place(element).name for element in k.heads[0]]
        if len(set(owners)) < 2 or len(k.heads) < 2:
            return None
        return ["rope" if k.heads[0][i] == k.heads[1][i] else "nope" for i in range(len(owners))]

    def _enter(self, part: str, vectors: Vectors, numbers: Sequence[int], split: list[str] | None) -> None:
        shared = Counter(element for head in vectors.heads for element in set(head))
        offset: dict[tuple[str, str], int] = {}
        for head, elements in zip(numbers, vectors.heads, strict=True):
            for dim, element in enumerate(elements):
                name = part
                if split is not None and (part == "q" or split[dim] == "rope"):
                    name = split[dim]
                start = offset.setdefault((self.place(element).name, name), dim)
                self._assign(element, name, 0 if len(vectors.heads) > 1 and shared[element] == len(vectors.heads) else head, dim - start)

    def _scan(self, scan: Scan) -> None:
        for part, labels in scan.operands.items():
            rows = row(labels)
            pure = (rows >= 0).all(2).all(1).nonzero()
            if not len(pure):
                continue
            for elements in dict.fromkeys(map(tuple, rows[int(pure[0])].tolist())):
                known = self.scanned.setdefault((self.place(elements[0]).name, part), [])
                if elements not in known:  # some code scans head by head
                    known.append(elements)
                if part == "x":
                    self.head_of_scan.setdefault(scan.out, known.index(elements))
                for dim, element in enumerate(elements):
                    self._assign(element, part, known.index(elements), dim)

    def _drop_outputs(self) -> None:
        """Rows of an output projection that pass for keys and values: what code attends over is then the stream of data itself."""
        for name, table in list(self.tables.items()):
            if table.place.first in self.log.closing and all(set(roles) == {"k", "v"} for roles in table.roles.values()):
                del self.tables[name]

    def _place_in(self, scan: Scan, at: int) -> tuple[int, int] | None:
        """(head, dim) of an element of the output."""
        if not 0 <= at < math.prod(scan.out_shape):
            return None
        if scan.channels:
            return self.head_of_scan.get(scan.out, 0), at // scan.out_shape[2] % scan.out_shape[1]
        return at // scan.out_shape[-1] % scan.out_shape[-2], at % scan.out_shape[-1]

    def _gates(self) -> None:
        found: dict[tuple[int, str], set[tuple[int, int]]] = {}
        for pairs in self.log.gates:
            for element, out in {*map(tuple, pairs.T.tolist())}:
                for scan in self.log.scans:
                    place = self._place_in(scan, out - scan.out)
                    if place is not None and "x" not in self._parts_of(element):
                        found.setdefault((element, "z"), set()).add(place)
                for number, of_out in self.heads_of_out.items():
                    seen = self.log.attentions[number]
                    at = out - seen.out
                    if 0 <= at < math.prod(seen.out_shape):
                        assert seen.q_of is not None
                        vector, dim = divmod(at, seen.out_shape[-1])
                        head = of_out.get(int(seen.q_of.flatten()[vector]))
                        if head is not None:
                            found.setdefault((element, "z" if seen.recurrent else "gate"), set()).add((head, dim))
        for (element, part), places in found.items():
            heads = {head for head, _ in places}
            if len(heads) == 1:
                self._assign(element, part, heads.pop(), min(dim for _, dim in places))

    def outputs(self) -> dict[str, Columns]:
        """Parameter -> what the lines are that an attention's output is multiplied with."""
        numbers = sorted(self.heads_of_out, key=lambda number: self.log.attentions[number].out)
        starts = [self.log.attentions[number].out for number in numbers]
        found = {}
        for first, outs in self.log.closing.items():
            read = [self._output(numbers[bisect.bisect_right(starts, out) - 1], out) if numbers else None for out in outs.tolist()]
            places = [(head, dim) for number, head, dim in filter(None, read)]
            queries = {self.queries[number] for number, _, _ in filter(None, read)}
            if len(places) == len(read) and len(queries) == 1:
                place = self.place(first)
                found[place.name] = Columns(queries.pop(), place.summed, places)
        return found

    def _output(self, number: int, out: int) -> tuple[int, int, int] | None:
        """(attention, head, dim) of an element of its output."""
        seen = self.log.attentions[number]
        if not 0 <= out - seen.out < math.prod(seen.out_shape):
            return None
        assert seen.q_of is not None
        vector, dim = divmod(out - seen.out, seen.out_shape[-1])
        head = self.heads_of_out[number].get(int(seen.q_of.flatten()[vector]))
        return None if head is None else (number, head, dim)

    def _parts_of(self, element: int) -> Roles:
        place = self.place(element)
        table = self.tables.get(place.name)
        return {} if table is None else table.roles.get(place.row(element), {})

    def _latents(self) -> None:
        """Rows beside known ones that only feed another projection."""
        for vector in self.log.fed.values():
            elements = vector.tolist()
            for dim, element in enumerate(elements):
                if element < 0:
                    continue
                place = self.place(element)
                table = self.tables.get(place.name)
                if table is not None and place.row(element) not in table.roles:
                    known = {part for roles in table.roles.values() for part in roles}
                    table.roles[place.row(element)] = {"dt" if "B" in known else "latent": (0, dim)}

    def _mixed(self) -> None:
        """A convolution over each channel: its rows are what the channels are."""
        for channels, rows in self.log.mixed.values():
            for channel, element in zip(channels.tolist(), rows.tolist(), strict=True):
                place = self.place(channel) if channel >= 0 else None
                table = self.tables.get(place.name) if place is not None else None
                if place is None or table is None:
                    continue
                for part, (head, dim) in table.roles.get(place.row(channel), {}).items():
                    self._assign(element, part, head, dim)

    def _gated_units(self) -> None:
        """activation(gate) * up, of one projection without other roles."""
        for both in self.log.products:
            pairs = both[:, (token(both[0]) == token(both[1])) & (((both[0] ^ both[1]) & ACTIVE) != 0)]
            first = (pairs[0] & ACTIVE) != 0
            units: Labels = distinct(
                torch.stack([row(torch.where(first, pairs[0], pairs[1])), row(torch.where(first, pairs[1], pairs[0]))])
            ).numpy()
            owners = np.searchsorted(self.starts, units, side="right") - 1
            for owner in np.unique(owners[0, owners[0] == owners[1]]):
                place = self.places[owner]
                if place.name in self.tables:
                    continue
                gates, ups = (place.rows_of(side) for side in units[:, (owners == owner).all(0)])
                by_row = dict(zip(gates.tolist(), ups.tolist(), strict=True))
                if 2 * len(by_row) != place.rows or len({*by_row, *by_row.values()}) != place.rows:
                    continue
                table = self.table(place)
                for dim, gate in enumerate(sorted(by_row)):
                    table.add(gate, "gate", 0, dim)
                    table.add(by_row[gate], "up", 0, dim)

    def _short_convolutions(self) -> None:
        """out_gate * convolution(in_gate * x), of one projection without other roles."""
        convolved = {int(channel) for channels, _ in self.log.mixed.values() for channel in channels.tolist()}
        units: dict[str, list[dict[int, int]]] = {}
        for both in self.log.products:
            rows = distinct(torch.stack([row(both[0]), row(both[1])])).tolist()
            place = self.place(rows[0][0])
            if place.name not in self.tables and all(self.place(element) is place for side in rows for element in side):
                units.setdefault(place.name, []).append(dict(zip(*rows, strict=True)))
        for place in self.places:
            for inner, outer in itertools.pairwise(units.get(place.name, [])):
                meets = outer if set(outer.values()) == set(inner) else {b: a for a, b in outer.items()}
                gates = {inside: outside for outside, inside in meets.items()}
                members = {*inner, *inner.values(), *gates.values()}
                if set(gates) == set(inner) <= convolved and len(inner) * 3 == place.rows == len(members) and place.name not in self.tables:
                    table = self.table(place)
                    table.doubts.add("in_gate and x are named by their order in a product")
                    for dim, inside in enumerate(sorted(inner)):
                        for part, element in (("in_gate", inside), ("x", inner[inside]), ("out_gate", gates[inside])):
                            table.add(place.row(element), part, 0, dim)

    def _biases(self) -> None:
        """A bias beside a weight must add to the rows of its own numbers."""
        for pairs in self.log.biases:
            rows, biases = distinct(pairs).numpy()
            of_row, of_bias = (np.searchsorted(self.starts, side, side="right") - 1 for side in (rows, biases))
            for w, b in {*zip(of_row.tolist(), of_bias.tolist(), strict=True)}:
                weight, bias = self.places[w], self.places[b]
                table = self.tables.get(weight.name)
                ours = (of_row == w) & (of_bias == b)
                if table is None or bias.name == weight.name or bias.name != "bias".join(weight.name.rsplit("weight", 1)):
                    continue
                if not np.array_equal(weight.rows_of(rows[ours]), bias.rows_of(biases[ours])):
                    table.doubts.add("the bias is added to other rows than the weight's of the same number")


def _served(q: Vectors, k: Vectors, pairs: torch.Tensor) -> dict[int, int]:
    """Query head -> the one kv head that it meets; empty when some head meets several."""
    kv_of: dict[int, int] = {}
    for i, j in {*map(tuple, pairs.T.tolist())}:
        a, b = (heads[n] if n < len(heads) else -1 for n, heads in ((i, q.head_of), (j, k.head_of)))
        if a >= 0 and b >= 0 and kv_of.setdefault(a, b) != b:
            return {}
    return kv_of
