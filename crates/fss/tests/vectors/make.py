#!/usr/bin/env python3
"""Writes fss.txt: python3 make.py > fss.txt

An implementation of the keys from their definition alone, one key and one node at a time, which shares no code with the
crate. Roots are SHA-256 of a label. Needs nothing beyond the standard library.
"""

import hashlib

U64 = (1 << 64) - 1


def aes_tables():
    """The S-box: inversion in GF(2^8) by powers of the generator 3, then the affine map (FIPS 197, section 5.1.1)."""
    power, log, x = [], {}, 1
    for i in range(255):
        power.append(x)
        log[x] = i
        x ^= (x << 1) ^ (0x11B if x & 0x80 else 0)
        x &= 0xFF
    box = []
    for v in range(256):
        inverse = power[-log[v] % 255] if v else 0
        folded = 0
        for r in range(5):
            folded ^= (inverse << r | inverse >> (8 - r)) & 0xFF
        box.append(folded ^ 0x63)
    return box


BOX = aes_tables()


def double(x):
    return (x << 1 ^ (0x11B if x & 0x80 else 0)) & 0xFF


def key_schedule(key):
    words = [list(key[i : i + 4]) for i in range(0, 16, 4)]
    rcon = 1
    for i in range(4, 44):
        w = words[-1]
        if i % 4 == 0:
            w = [BOX[b] for b in w[1:] + w[:1]]
            w[0] ^= rcon
            rcon = double(rcon)
        words.append([a ^ b for a, b in zip(words[i - 4], w)])
    return [sum(words[i : i + 4], []) for i in range(0, 44, 4)]


def aes(keys, block):
    s = [a ^ b for a, b in zip(block, keys[0])]
    for r in range(1, 11):
        s = [BOX[s[(i + 4 * (i % 4)) % 16]] for i in range(16)]
        if r < 10:
            mixed = []
            for c in range(0, 16, 4):
                col = s[c : c + 4]
                total = col[0] ^ col[1] ^ col[2] ^ col[3]
                mixed += [col[i] ^ total ^ double(col[i] ^ col[(i + 1) % 4]) for i in range(4)]
            s = mixed
        s = [a ^ b for a, b in zip(s, keys[r])]
    return bytes(s)


assert aes(key_schedule(bytes(range(16))), bytes.fromhex("00112233445566778899aabbccddeeff")).hex() == (
    "69c4e0d86a7b0430d8cdb78070b4c55a"  # FIPS 197, appendix C.1
)
PI = key_schedule(bytes.fromhex("243f6a8885a308d313198a2e03707344"))


def H(x):
    sigma = ((x >> 64) ^ (x & U64)) << 64 | x >> 64
    return int.from_bytes(aes(PI, sigma.to_bytes(16, "little")), "little") ^ sigma


def halves(x):
    return [x & U64, x >> 64]


def deal_tree(path, roots):
    """Correction words along a path of bits, and the parties' seeds before each of them and at the end."""
    seeds = [roots[0] & ~1, roots[1] | 1]
    delta = seeds[0] ^ seeds[1]
    words, visited = [], [seeds]
    for right in path:
        cw = H(seeds[0]) ^ H(seeds[1]) ^ (0 if right else delta)
        seeds = [child(s, right, cw) for s in seeds]
        words.append(cw)
        visited.append(seeds)
    return words, visited


def child(s, right, cw):
    return H(s) ^ (s if right else 0) ^ (cw if s & 1 else 0)


def correct(seeds, h, value):
    cw = (value - h[0] + h[1]) & U64
    return cw if seeds[0] & 1 else -cw & U64


def block_correction(seeds, tweak, values):
    h = [halves(H(s ^ tweak)) for s in seeds]
    return sum(correct(seeds, (h[0][i], h[1][i]), values[i]) << 64 * i for i in range(2))


def words_bytes(words, size=16):
    return b"".join(w.to_bytes(size, "little") for w in words)


def read(key, index):
    return int.from_bytes(key[16 * index : 16 * index + 16], "little")


def bits_of(x, high, low):
    """Bits high-1 .. low of x, from the top."""
    return [x >> i & 1 for i in range(high - 1, low - 1, -1)]


def root(party, roots):
    return roots[party] & ~1 | party


def element(party, s, tweak, cw, x):
    share = halves(H(s ^ tweak))[x & 1] + (halves(cw)[x & 1] if s & 1 else 0)
    return (-share if party else share) & U64


def cmp_deal(bits, alpha, roots):
    words, visited = deal_tree(bits_of(alpha, bits, min(bits, 8)), roots)
    below = (1 << (alpha & 255)) - 1
    for block in range(1 if bits < 8 else 2):
        h = [H(s ^ (2, 4)[block]) for s in visited[-1]]
        words.append(h[0] ^ h[1] ^ (below >> 128 * block & ((1 << 128) - 1)))
    return words_bytes(words)


def cmp_evaluate(party, bits, roots, key, x):
    s, share = root(party, roots), 0
    path = bits_of(x, bits, min(bits, 8))
    for level, right in enumerate(path):
        left = child(s, 0, read(key, level))
        if right:
            s = child(s, 1, read(key, level))
        else:  # alpha may lie below the right sibling
            share ^= child(s, 1, read(key, level)) & 1
            s = left
    block = x >> 7 & 1
    leaf = H(s ^ (2, 4)[block]) ^ (read(key, len(path) + block) if s & 1 else 0)
    return share ^ (leaf >> (x & 127) & 1)


def dpf_parts(bits, x):
    return bits_of(x, bits - 1, 1), 0 if bits == 1 else x >> (bits - 1)


def dpf_deal(bits, alpha, roots):
    path, place = dpf_parts(bits, alpha)
    words, visited = deal_tree(path, roots)
    for block in range(1 if bits == 1 else 2):
        values = [int(block == place and alpha & 1 == i) for i in range(2)]
        words.append(block_correction(visited[-1], (2, 4)[block], values))
    return words_bytes(words)


def dpf_evaluate(party, bits, roots, key, x):
    s = root(party, roots)
    path, block = dpf_parts(bits, x)
    for level, right in enumerate(path):
        s = child(s, right, read(key, level))
    return element(party, s, (2, 4)[block], read(key, len(path) + block), x)


def table_entry(j):
    return (j + 1) * 0xD1342543DE82EF95 & U64


def table_evaluate(party, bits, roots, key, offset):
    entries = (
        dpf_evaluate(party, bits, roots, key, j) * table_entry((j + offset) % (1 << bits)) for j in range(1 << bits)
    )
    return sum(entries) & U64


def dcf_deal(bits, alpha, beta, roots):
    path = bits_of(alpha, bits, min(bits, 2))
    words, visited = deal_tree(path, roots)
    values, total = [], 0
    for seeds, bit in zip(visited, path):
        h = [halves(H(s ^ 2))[0] for s in seeds]
        values.append(correct(seeds, h, (beta * bit - total) & U64))
        total = beta * bit
    for block in range(1 if bits == 1 else 2):
        rest = [(beta * (2 * block + i < (alpha & 3)) - total) & U64 for i in range(2)]
        words.append(block_correction(visited[-1], (2, 4)[block], rest))
    return words_bytes(words) + words_bytes(values, 8)


def dcf_evaluate(party, bits, roots, key, x):
    s, share = root(party, roots), 0
    path = bits_of(x, bits, min(bits, 2))
    values = key[16 * (len(path) + (1 if bits == 1 else 2)) :]
    for level, right in enumerate(path):
        cw = int.from_bytes(values[8 * level : 8 * level + 8], "little")
        share += halves(H(s ^ 2))[0] + (cw if s & 1 else 0)
        s = child(s, right, read(key, level))
    block = x >> 1 & 1
    return ((-share if party else share) + element(party, s, (2, 4)[block], read(key, len(path) + block), x)) & U64


def line(gate, bits, alpha, beta, x):
    label = f"veiltune-fss {gate} {bits} {alpha:x} {beta:x} {x:x}"
    digest = hashlib.sha256(label.encode()).digest()
    roots = [int.from_bytes(digest[:16], "little"), int.from_bytes(digest[16:], "little")]
    if gate == "cmp":
        key = cmp_deal(bits, alpha, roots)
        shares = [cmp_evaluate(p, bits, roots, key, x) for p in range(2)]
        assert shares[0] ^ shares[1] == (x < alpha), label
    elif gate == "dcf":
        key = dcf_deal(bits, alpha, beta, roots)
        shares = [dcf_evaluate(p, bits, roots, key, x) for p in range(2)]
        assert sum(shares) & U64 == (beta if x < alpha else 0), label
    else:
        key = dpf_deal(bits, alpha, roots)
        evaluate = table_evaluate if gate == "table" else dpf_evaluate
        shares = [evaluate(p, bits, roots, key, x) for p in range(2)]
        expected = table_entry((alpha + x) % (1 << bits)) if gate == "table" else x == alpha
        assert sum(shares) & U64 == expected, label
    print(f"{gate} {bits} {alpha:x} {beta:x} {roots[0]:032x} {roots[1]:032x} {x:x} {key.hex()} {shares[0]:x} {shares[1]:x}")


print("# Known answers, made by make.py. Numbers but `bits` are hexadecimal; the key is its bytes in order.")
print("# For `table`, x is the offset, and entry j of the table is (j + 1) * d1342543de82ef95 modulo 2^64.")
print("# gate bits alpha beta root0 root1 x key share0 share1")
for gate in ("cmp", "dpf", "dcf", "table"):
    for bits in (1, 2, 5, 7, 8, 9, 12) if gate == "table" else (1, 2, 7, 8, 9, 16, 24, 40, 64):
        top = (1 << bits) - 1
        middle = 0xB7E151628AED2A6A >> (64 - bits)  # the digits of e
        for alpha, x in ((0, 0), (top, 0), (middle, middle), (middle, max(middle - 1, 0)), (middle, top)):
            line(gate, bits, alpha, 0x9E3779B97F4A7C15 if gate == "dcf" else 0, x)
