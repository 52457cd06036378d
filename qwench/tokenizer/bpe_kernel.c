/* Byte-level BPE in bulk: UTF-8 texts to ids, for `qwench.tokenizer.bpe_native`.
 *
 * Texts are cut as `bpe.PATTERN` says and the pieces encoded exactly. Short pieces are looked up in a table of fixed
 * size; the others take time linear in their length: the longest token that matches is tried first, and kept if merging
 * would leave the border to the token before it alone. Whether it would is found by undoing the merges on both sides of
 * the border, newest first: one that was made after a merge across the border became possible is a contradiction. Where
 * no token fits, the one before it is shortened.
 *
 * Correct for vocabularies in which every token is what its own bytes merge to; `qwench_bpe_new` checks that.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { LETTER = 1, NUMBER = 2, SPACE = 4, UNUSUAL = 8, UNKNOWN = 16 };
enum { SHORT = 15, KEPT = 3, PIECE_BITS = 15, BORDER_BITS = 17 };

typedef struct { int32_t base, check, token; } Node;
typedef struct { uint32_t left, right, token; } Pair;
typedef struct { uint64_t low, high; uint32_t count, ids[KEPT]; } Known;

typedef struct {
    int64_t num;
    uint8_t *bytes;          /* of all tokens, end to end */
    int64_t *starts;         /* [num + 1] */
    uint32_t *left, *right;  /* what a token was merged from; itself for a byte */
    int32_t *prefix;         /* the longest token that it begins with, -1 for none */
    Pair *pairs;
    uint32_t pair_mask;
    uint64_t *maybe;         /* bits of pairs' hashes: most that are looked up are none, and this stays near */
    uint64_t maybe_mask;
    uint16_t *lengths;       /* of tokens */
    Node *nodes;
    int64_t num_nodes;
    uint32_t of_byte[256];
    const uint8_t *classes;  /* [0x110000], the caller's */
} Bpe;

/* What one thread has and no other may use. */
typedef struct {
    Known *pieces;
    uint64_t *borders;
    uint32_t *stack;
    uint8_t *open;
    int64_t room;
} Scratch;

#define NONE UINT32_MAX

static inline uint64_t mixed(uint64_t a, uint64_t b) {
    uint64_t x = (a ^ 0x9E3779B97F4A7C15u) * 0xD6E8FEB86659FD93u;
    x = (x ^ x >> 32 ^ b) * 0xC2B2AE3D27D4EB4Fu;
    return x ^ x >> 32;
}

/* ---------------------------------------------------------------------------------------------------------- tables */
static inline uint32_t merged(const Bpe *bpe, uint32_t left, uint32_t right) {
    uint64_t hash = mixed(left, right);
    if (!(bpe->maybe[(hash & bpe->maybe_mask) >> 6] >> (hash & 63) & 1)) return NONE;
    uint32_t at = (uint32_t)(hash >> 24) & bpe->pair_mask;
    for (;; at = (at + 1) & bpe->pair_mask) {
        const Pair *pair = bpe->pairs + at;
        if (pair->left == left && pair->right == right) return pair->token;
        if (pair->token == NONE) return NONE;
    }
}

static void remember_pair(Bpe *bpe, uint32_t left, uint32_t right, uint32_t token) {
    uint64_t hash = mixed(left, right);
    uint32_t at = (uint32_t)(hash >> 24) & bpe->pair_mask;
    bpe->maybe[(hash & bpe->maybe_mask) >> 6] |= (uint64_t)1 << (hash & 63);
    while (bpe->pairs[at].token != NONE) {
        if (bpe->pairs[at].left == left && bpe->pairs[at].right == right) return;
        at = (at + 1) & bpe->pair_mask;
    }
    bpe->pairs[at] = (Pair){left, right, token};
}

typedef struct { const uint8_t *bytes; int64_t length; uint32_t token; } Spelling;

static int by_bytes(const void *a, const void *b) {
    const Spelling *x = a, *y = b;
    int64_t shorter = x->length < y->length ? x->length : y->length;
    int order = memcmp(x->bytes, y->bytes, (size_t)shorter);
    return order ? order : (x->length > y->length) - (x->length < y->length);
}

static int grow(Bpe *bpe, int64_t num) {
    if (num <= bpe->num_nodes) return 1;
    int64_t room = num * 3 / 2 + 1024;
    Node *nodes = realloc(bpe->nodes, (size_t)room * sizeof(Node));
    if (!nodes) return 0;
    for (int64_t i = bpe->num_nodes; i < room; i++) nodes[i] = (Node){0, -1, -1};
    bpe->nodes = nodes, bpe->num_nodes = room;
    return 1;
}

typedef struct { int64_t low, high; int32_t depth, node; } Range;

/* A double-array trie of all tokens: the child of node n for byte c is base(n) + c if that one's check is n. */
static int make_trie(Bpe *bpe, Spelling *sorted) {
    int64_t room = 1024, waiting = 0, first_free = 1;
    Range *ranges = malloc((size_t)room * sizeof(Range));
    if (!ranges || !grow(bpe, 4096)) { free(ranges); return 0; }
    bpe->nodes[0].check = 0;
    ranges[waiting++] = (Range){0, bpe->num, 0, 0};
    while (waiting) {
        Range range = ranges[--waiting];
        if (sorted[range.low].length == range.depth) bpe->nodes[range.node].token = (int32_t)sorted[range.low++].token;
        if (range.low == range.high) continue;
        uint8_t letters[256];
        int64_t bounds[257];
        int num = 0;
        for (int64_t i = range.low; i < range.high; i++) {
            uint8_t letter = sorted[i].bytes[range.depth];
            if (!num || letters[num - 1] != letter) letters[num] = letter, bounds[num++] = i;
        }
        bounds[num] = range.high;
        while (first_free < bpe->num_nodes && bpe->nodes[first_free].check >= 0) first_free++;
        int64_t slot = first_free > letters[0] ? first_free : letters[0] + 1, base;
        for (;; slot++) {
            base = slot - letters[0];
            if (!grow(bpe, base + 257)) { free(ranges); return 0; }
            int taken = 0;
            for (int i = 0; i < num && !taken; i++) taken = bpe->nodes[base + letters[i]].check >= 0;
            if (!taken) break;
        }
        bpe->nodes[range.node].base = (int32_t)base;
        if (waiting + num > room) {
            room = (waiting + num) * 2;
            Range *more = realloc(ranges, (size_t)room * sizeof(Range));
            if (!more) { free(ranges); return 0; }
            ranges = more;
        }
        for (int i = 0; i < num; i++) {
            bpe->nodes[base + letters[i]].check = range.node;
            ranges[waiting++] = (Range){bounds[i], bounds[i + 1], range.depth + 1, (int32_t)(base + letters[i])};
        }
    }
    free(ranges);
    return 1;
}

static inline int32_t longest(const Bpe *bpe, const uint8_t *at, const uint8_t *end) {
    const Node *nodes = bpe->nodes;
    int32_t node = 0, found = -1;
    while (at < end) {
        int32_t next = nodes[node].base + *at++;
        if (nodes[next].check != node) break;
        node = next;
        if (nodes[node].token >= 0) found = nodes[node].token;
    }
    return found;
}

static int32_t exactly(const Bpe *bpe, const uint8_t *at, int64_t length) {
    int32_t node = 0;
    for (int64_t i = 0; i < length; i++) {
        int32_t next = bpe->nodes[node].base + at[i];
        if (bpe->nodes[next].check != node) return -1;
        node = next;
    }
    return bpe->nodes[node].token;
}

/* Merge by definition, lowest first, only what is below `limit`: parts left, their ids in `parts`. Quadratic. */
static int64_t merge_plainly(const Bpe *bpe, const uint8_t *bytes, int64_t length, uint32_t limit, uint32_t *parts) {
    for (int64_t i = 0; i < length; i++) parts[i] = bpe->of_byte[bytes[i]];
    while (length > 1) {
        uint32_t best = NONE;
        int64_t place = 0;
        for (int64_t i = 0; i + 1 < length; i++) {
            uint32_t token = merged(bpe, parts[i], parts[i + 1]);
            if (token < best) best = token, place = i;
        }
        if (best >= limit) break;
        parts[place] = best;
        memmove(parts + place + 1, parts + place + 2, (size_t)(length - place - 2) * sizeof *parts);
        length--;
    }
    return length;
}

void qwench_bpe_free(Bpe *bpe) {
    if (!bpe) return;
    free(bpe->bytes), free(bpe->starts), free(bpe->left), free(bpe->right), free(bpe->prefix);
    free(bpe->pairs), free(bpe->maybe), free(bpe->lengths), free(bpe->nodes), free(bpe);
}

/* Tokens by their bytes, in the order of their ids, the first 256 single bytes; `left_lengths` [num]: how many bytes of
 * a token its left part has. NULL with *problem: a token's number whose bytes do not merge to it, or -1 for no memory. */
Bpe *qwench_bpe_new(const uint8_t *bytes, const int64_t *starts, int64_t num, const int32_t *left_lengths,
                    const uint8_t *classes, int64_t *problem) {
    *problem = -1;
    Bpe *bpe = calloc(1, sizeof(Bpe));
    if (!bpe) return NULL;
    int64_t longest_token = 0;
    bpe->num = num, bpe->classes = classes, bpe->pair_mask = 1023;
    while (bpe->pair_mask < num * 2) bpe->pair_mask = bpe->pair_mask * 2 + 1;
    bpe->maybe_mask = ((uint64_t)bpe->pair_mask + 1) * 4 - 1;
    bpe->maybe = calloc((size_t)(bpe->maybe_mask >> 6) + 1, sizeof(uint64_t));
    bpe->lengths = malloc((size_t)num * sizeof(uint16_t));
    bpe->bytes = malloc((size_t)starts[num] + 1), bpe->starts = malloc((size_t)(num + 1) * sizeof(int64_t));
    bpe->left = malloc((size_t)num * 4), bpe->right = malloc((size_t)num * 4), bpe->prefix = malloc((size_t)num * 4);
    bpe->pairs = malloc(((size_t)bpe->pair_mask + 1) * sizeof(Pair));
    Spelling *sorted = malloc((size_t)num * sizeof(Spelling));
    if (!bpe->bytes || !bpe->starts || !bpe->left || !bpe->right || !bpe->prefix || !bpe->pairs || !sorted) goto failed;
    if (!bpe->maybe || !bpe->lengths) goto failed;
    memcpy(bpe->bytes, bytes, (size_t)starts[num]);
    memcpy(bpe->starts, starts, (size_t)(num + 1) * sizeof(int64_t));
    memset(bpe->pairs, 0xFF, ((size_t)bpe->pair_mask + 1) * sizeof(Pair));
    for (int64_t i = 0; i < num; i++) {
        sorted[i] = (Spelling){bpe->bytes + starts[i], starts[i + 1] - starts[i], (uint32_t)i};
        if (sorted[i].length > longest_token) longest_token = sorted[i].length;
        if (sorted[i].length > UINT16_MAX) { *problem = i; goto failed; }
        bpe->lengths[i] = (uint16_t)sorted[i].length;
    }
    qsort(sorted, (size_t)num, sizeof(Spelling), by_bytes);
    int made = make_trie(bpe, sorted);
    if (!made) goto failed;
    for (int64_t i = 0; i < num; i++) {
        const uint8_t *at = bpe->bytes + starts[i];
        int64_t length = starts[i + 1] - starts[i];
        bpe->prefix[i] = length > 1 ? longest(bpe, at, at + length - 1) : -1;
        bpe->left[i] = bpe->right[i] = (uint32_t)i;
        if (i < 256) { bpe->of_byte[*at] = (uint32_t)i; continue; }
        int32_t left = exactly(bpe, at, left_lengths[i]);
        int32_t right = exactly(bpe, at + left_lengths[i], length - left_lengths[i]);
        *problem = i;
        if (left < 0 || right < 0 || left >= i || right >= i) goto failed;
        bpe->left[i] = (uint32_t)left, bpe->right[i] = (uint32_t)right;
        remember_pair(bpe, (uint32_t)left, (uint32_t)right, (uint32_t)i);
    }
    *problem = -1;
    uint32_t *parts = malloc((size_t)(longest_token + 1) * sizeof *parts);
    if (!parts) goto failed;
    for (int64_t i = 256; i < num; i++)
        if (merge_plainly(bpe, bpe->bytes + starts[i], starts[i + 1] - starts[i], NONE, parts) != 1 || parts[0] != i) {
            *problem = i;
            free(parts);
            goto failed;
        }
    free(parts), free(sorted);
    return bpe;
failed:
    free(sorted);
    qwench_bpe_free(bpe);
    return NULL;
}

/* -------------------------------------------------------------------------------------------------------- scratch */
void qwench_bpe_scratch_free(Scratch *scratch) {
    if (!scratch) return;
    free(scratch->pieces), free(scratch->borders), free(scratch->stack), free(scratch->open), free(scratch);
}

Scratch *qwench_bpe_scratch_new(void) {
    Scratch *scratch = calloc(1, sizeof(Scratch));
    if (!scratch) return NULL;
    scratch->pieces = aligned_alloc(2 * sizeof(Known), ((size_t)2 << PIECE_BITS) * sizeof(Known)); /* lines of a cache */
    scratch->borders = malloc(((size_t)1 << BORDER_BITS) * sizeof(uint64_t));
    if (!scratch->pieces || !scratch->borders) {
        qwench_bpe_scratch_free(scratch);
        return NULL;
    }
    memset(scratch->pieces, 0, ((size_t)2 << PIECE_BITS) * sizeof(Known));
    memset(scratch->borders, 0xFF, ((size_t)1 << BORDER_BITS) * sizeof(uint64_t));
    return scratch;
}

/* ------------------------------------------------------------------------------------------------------- encoding */
/* Whether merging leaves the border between two tokens alone. */
static int border_holds(const Bpe *bpe, uint32_t left, uint32_t right) {
    uint32_t limit = NONE; /* a merge across the border has to be older than the one undone last */
    for (;;) {
        if (merged(bpe, left, right) < limit) return 0;
        int left_is_byte = left < 256, right_is_byte = right < 256;
        if (left_is_byte && right_is_byte) return 1;
        /* The newer of the two. Equal merges are made from the left, hence the 1. */
        if (right_is_byte || (!left_is_byte && left > right)) limit = left, left = bpe->right[left];
        else limit = right + 1, right = bpe->left[right];
    }
}

static inline int holds(const Bpe *bpe, Scratch *scratch, uint32_t left, uint32_t right) {
    uint64_t key = ((uint64_t)left << 32 | right) << 1;
    uint64_t *place = scratch->borders + (mixed(left, right) & (((uint64_t)1 << BORDER_BITS) - 1));
    if ((*place | 1) == (key | 1)) return (int)(*place & 1);
    int result = border_holds(bpe, left, right);
    *place = key | (uint64_t)result;
    return result;
}

static uint32_t *encode_long(const Bpe *bpe, Scratch *scratch, const uint8_t *piece, int64_t length, uint32_t *out) {
    if (length > scratch->room) {
        int64_t room = length * 2 + 256;
        free(scratch->stack), free(scratch->open);
        scratch->stack = malloc((size_t)room * sizeof(uint32_t)), scratch->open = malloc((size_t)room + 1);
        scratch->room = scratch->stack && scratch->open ? room : 0;
        if (!scratch->room) return NULL;
    }
    uint32_t *stack = scratch->stack;
    uint8_t *open = scratch->open; /* positions at which a token may still end */
    memset(open, 1, (size_t)length + 1);
    int64_t num = 0, at = 0;
    int32_t next = longest(bpe, piece, piece + length);
    while (at < length) {
        int32_t token = next;
        for (;; token = bpe->prefix[token]) {
            if (token < 0) {
                open[at] = 0;
                next = (int32_t)stack[--num];
                at -= bpe->lengths[next];
                break;
            }
            int64_t end = at + bpe->lengths[token];
            if (open[end] && (!num || holds(bpe, scratch, stack[num - 1], (uint32_t)token))) {
                stack[num++] = (uint32_t)token;
                at = end;
                next = longest(bpe, piece + at, piece + length);
                break;
            }
        }
    }
    memcpy(out, stack, (size_t)num * sizeof *out);
    return out + num;
}

static inline uint32_t *encode_piece(const Bpe *bpe, Scratch *scratch, const uint8_t *piece, int64_t length,
                                     const uint8_t *limit, uint32_t *out) {
    if (length == 1) {
        *out = bpe->of_byte[*piece];
        return out + 1;
    }
    if (length > SHORT) return encode_long(bpe, scratch, piece, length, out);
    uint64_t low = 0, high = 0;
    if (piece + 16 <= limit) { /* two loads; what stands behind the piece is cut off */
        memcpy(&low, piece, 8), memcpy(&high, piece + 8, 8);
        if (length < 8) low &= ~(uint64_t)0 >> (64 - 8 * length), high = 0;
        else high = length == 8 ? 0 : high & ~(uint64_t)0 >> (128 - 8 * length);
    } else {
        uint8_t padded[16] = {0};
        memcpy(padded, piece, (size_t)length);
        memcpy(&low, padded, 8), memcpy(&high, padded + 8, 8);
    }
    high |= (uint64_t)length << 56;
    Known *set = scratch->pieces + 2 * (mixed(low, high) & (((uint64_t)1 << PIECE_BITS) - 1));
    for (int i = 0; i < 2; i++)
        if (set[i].low == low && set[i].high == high) {
            memcpy(out, set[i].ids, sizeof set[i].ids);
            return out + set[i].count;
        }
    uint32_t *end = encode_long(bpe, scratch, piece, length, out);
    if (end && end - out <= KEPT) {
        set[1] = set[0];
        set[0] = (Known){low, high, (uint32_t)(end - out), {0}};
        memcpy(set[0].ids, out, (size_t)(end - out) * sizeof *out);
    }
    return end;
}

/* The code point at `at` (valid UTF-8) and its bytes. */
static inline uint32_t letter_at(const uint8_t *at, int *size) {
    uint32_t c = *at;
    if (c < 0x80) return *size = 1, c;
    if (c < 0xE0) return *size = 2, (c & 31) << 6 | (at[1] & 63);
    if (c < 0xF0) return *size = 3, (c & 15) << 12 | (uint32_t)(at[1] & 63) << 6 | (at[2] & 63);
    return *size = 4, (c & 7) << 18 | (uint32_t)(at[1] & 63) << 12 | (uint32_t)(at[2] & 63) << 6 | (at[3] & 63);
}

#define CLASS(at, size) (bpe->classes[letter_at(at, &(size))])

static inline const uint8_t *letters_from(const Bpe *bpe, const uint8_t *at, const uint8_t *end, int *seen) {
    int size;
    while (at < end) {
        int class = CLASS(at, size);
        if (!(class & LETTER)) break;
        *seen |= class;
        at += size;
    }
    return at;
}

/* Bytes of 's, 't, 're, 've, 'm, 'll or 'd in any case, 0 if there is none. U+017F is an s, too. */
static inline int contraction(const uint8_t *at, const uint8_t *end) {
    if (end - at < 2) return 0;
    int first = at[1] | 32;
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return 2;
    if (end - at < 3) return 0;
    if (at[1] == 0xC5 && at[2] == 0xBF) return 3;
    int second = at[2] | 32;
    if (((first == 'r' || first == 'v') && second == 'e') || (first == 'l' && second == 'l')) return 3;
    return 0;
}

/* Where the piece that begins at `at` ends; `seen` gains the classes of letters that are not ASCII. */
static inline const uint8_t *piece_end(const Bpe *bpe, const uint8_t *at, const uint8_t *end, int *seen) {
    int size, size2, size3;
    int class = CLASS(at, size);
    *seen |= class;
    if (class & LETTER) return letters_from(bpe, at + size, end, seen);
    if (class & NUMBER) return at + size;
    const uint8_t *second = at + size;
    if (*at == '\'' && (size2 = contraction(at, end))) return at + size2;
    int line_end = *at == '\r' || *at == '\n';
    if (!line_end && second < end) {
        int next = CLASS(second, size2);
        if (next & LETTER) return *seen |= next, letters_from(bpe, second + size2, end, seen);
        if (*at == ' ' && !(next & (SPACE | NUMBER))) class = 0; /* one blank belongs to the marks behind it */
    }
    if (!(class & SPACE)) { /* marks, and the line ends behind them */
        while (second < end) {
            int next = CLASS(second, size2);
            if (next & (LETTER | NUMBER | SPACE)) break;
            *seen |= next;
            second += size2;
        }
        while (second < end && (*second == '\r' || *second == '\n')) second++;
        return second;
    }
    const uint8_t *last_line_end = line_end ? second : NULL, *before = at;
    while (second < end) {
        int next = CLASS(second, size3);
        if (!(next & SPACE)) break;
        *seen |= next;
        before = second;
        second += size3;
        if (*before == '\r' || *before == '\n') last_line_end = second;
    }
    if (last_line_end) return last_line_end;
    return second == end || before == at ? second : before; /* the last blank is for the next word */
}

/* Ids of texts, `bytes` from starts[i] to starts[i + 1], each followed by `closing` if that is no negative number.
 * `out` has room for every byte, KEPT more and the closings; ends[i] is where the ids of text i end. A text that may
 * not be NFC (unless `normal`), or whose letters may be classed otherwise elsewhere, has none, and marked[i] is 1.
 * Returns the ids written, -1 for no memory. */
int64_t qwench_bpe_encode(const Bpe *bpe, Scratch *scratch, const uint8_t *bytes, const int64_t *starts, int64_t num,
                          int64_t closing, int normal, uint32_t *out, int64_t *ends, uint8_t *marked) {
    uint32_t *to = out;
    const uint8_t *limit = bytes + starts[num];
    int refused = normal ? UNKNOWN : UNKNOWN | UNUSUAL;
    for (int64_t i = 0; i < num; i++) {
        const uint8_t *at = bytes + starts[i], *end = bytes + starts[i + 1];
        uint32_t *begin = to;
        int seen = 0;
        while (at < end && !(seen & refused)) {
            const uint8_t *next = piece_end(bpe, at, end, &seen);
            to = encode_piece(bpe, scratch, at, next - at, limit, to);
            if (!to) return -1;
            at = next;
        }
        marked[i] = (seen & refused) != 0;
        if (marked[i]) to = begin;
        else if (closing >= 0) *to++ = (uint32_t)closing;
        ends[i] = to - out;
    }
    return to - out;
}

/* How many bytes of each token from the 257th on its left part has, for a vocabulary without a list of merges: where
 * several splits are of earlier tokens, what the earlier ones merge its bytes to. Returns the number of the first token
 * that is no merge of two, `num` if there is none, -1 for no memory. */
int64_t qwench_bpe_splits(const uint8_t *bytes, const int64_t *starts, int64_t num, int32_t *left_lengths) {
    Bpe bpe = {.num = num};
    int64_t result = -1;
    Spelling *sorted = malloc((size_t)num * sizeof(Spelling));
    if (!sorted) goto done;
    for (int64_t i = 0; i < num; i++)
        sorted[i] = (Spelling){bytes + starts[i], starts[i + 1] - starts[i], (uint32_t)i};
    qsort(sorted, (size_t)num, sizeof(Spelling), by_bytes);
    if (!make_trie(&bpe, sorted)) goto done;
    for (result = 256; result < num; result++) {
        const uint8_t *at = bytes + starts[result];
        int64_t length = starts[result + 1] - starts[result];
        int found = 0;
        for (int64_t cut = 1; cut < length && found < 2; cut++) {
            int32_t left = exactly(&bpe, at, cut), right = exactly(&bpe, at + cut, length - cut);
            if (left >= 0 && right >= 0 && left < result && right < result) found++, left_lengths[result] = (int32_t)cut;
        }
        if (!found) break;
        if (found == 1) continue;
        /* By definition: the adjacent parts whose bytes are the earliest token, again and again. */
        int64_t left = length;
        int64_t cuts[257];
        if (length > 256) break;
        for (int64_t i = 0; i <= length; i++) cuts[i] = i;
        while (left > 2) {
            int32_t best = (int32_t)result;
            int64_t place = -1;
            for (int64_t i = 0; i + 1 < left; i++) {
                int32_t token = exactly(&bpe, at + cuts[i], cuts[i + 2] - cuts[i]);
                if (token >= 0 && token < best) best = token, place = i;
            }
            if (place < 0) break;
            memmove(cuts + place + 1, cuts + place + 2, (size_t)(left - place - 1) * sizeof *cuts);
            left--;
        }
        if (left != 2) break;
        left_lengths[result] = (int32_t)cuts[1];
    }
done:
    free(sorted), free(bpe.nodes);
    return result;
}
