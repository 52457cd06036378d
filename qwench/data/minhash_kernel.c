/* Normalising texts, MinHash signatures and window hashes: the inner loops of `data/minhash.py`. Not a Unicode library.

   Texts are UTF-8 that Python made, so it is valid apart from encoded surrogates. What a code point becomes and whether
   it separates words comes from tables that Python fills; every result equals that of the numpy code beside it, which
   is what runs where there is no compiler. `native.py` compiles this file. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define WIDEST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDEST
#endif

enum {
    ASK_PYTHON = 0xffffffffu, /* in the folding table: what it becomes depends on its neighbours */
    EXPANDS = 0x80000000u,    /* in the folding table: the rest is a place in the table of expansions */
    SEPARATOR = 0, WORD = 1, LETTER = 2, /* classes of code points; a LETTER is a token of its own */
    HELD = 512,     /* shingles gathered before the permutations run over them */
    MOST_TOKENS = 64 /* longest shingle, a power of two */
};

static const uint64_t BASE = 0x9e3779b97f4a7c15u, STEP = 0xd6e8feb86659fd93u;

static inline uint64_t mix(uint64_t x) {
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static inline uint32_t decode(const uint8_t **at, const uint8_t *end) {
    const uint8_t *p = *at;
    uint32_t c = *p++;
    int more = c < 0x80 ? 0 : c < 0xe0 ? 1 : c < 0xf0 ? 2 : 3;
    if (more) {
        c &= 0x3f >> more;
        while (more-- && p < end) c = c << 6 | (*p++ & 0x3f);
        if (c > 0x10ffff) c = 0xfffd;
    }
    *at = p;
    return c;
}

static inline uint8_t *encode(uint8_t *to, uint32_t c) {
    if (c < 0x80) {
        *to++ = (uint8_t)c;
    } else if (c < 0x800) {
        *to++ = (uint8_t)(0xc0 | c >> 6);
        *to++ = (uint8_t)(0x80 | (c & 0x3f));
    } else if (c < 0x10000) {
        *to++ = (uint8_t)(0xe0 | c >> 12);
        *to++ = (uint8_t)(0x80 | (c >> 6 & 0x3f));
        *to++ = (uint8_t)(0x80 | (c & 0x3f));
    } else {
        *to++ = (uint8_t)(0xf0 | c >> 18);
        *to++ = (uint8_t)(0x80 | (c >> 12 & 0x3f));
        *to++ = (uint8_t)(0x80 | (c >> 6 & 0x3f));
        *to++ = (uint8_t)(0x80 | (c & 0x3f));
    }
    return to;
}

/* Folds `text` into `to` with single blanks between words and none outside; returns the bytes written, or -1 when the
   text needs Python or more room. `fold` has an entry for every code point; an expansion is its length and then the code
   points. */
static int64_t normalise(const uint8_t *text, int64_t length, const uint32_t *fold, const uint32_t *expansions,
                         uint8_t *to, int64_t room) {
    const uint8_t *end = text + length;
    uint8_t *start = to, *last = to + room - 8;
    int blank = 0;
    while (text < end) {
        uint32_t c = fold[decode(&text, end)];
        const uint32_t *source = &c;
        uint32_t count = 1;
        if (c == ASK_PYTHON) return -1;
        if (c & EXPANDS) {
            source = expansions + (c & ~EXPANDS);
            count = *source++;
        }
        for (uint32_t i = 0; i < count; i++) {
            if (source[i] == ' ') {
                blank = to > start;
                continue;
            }
            if (to > last) return -1;
            if (blank) *to++ = ' ';
            blank = 0;
            to = encode(to, source[i]);
        }
    }
    return to - start;
}

/* The texts between `offsets`, one behind the other in `to`; `ends` says where each ends, or its complement is where the
   next begins and the text needs Python. */
void qwench_normalise(const uint8_t *texts, const int64_t *offsets, int64_t num_texts, const uint32_t *fold,
                      const uint32_t *expansions, uint8_t *to, int64_t room, int64_t *ends) {
    int64_t at = 0;
    for (int64_t i = 0; i < num_texts; i++) {
        int64_t size = -1;
        if (room - at > 8)
            size = normalise(texts + offsets[i], offsets[i + 1] - offsets[i], fold, expansions, to + at, room - at);
        if (size >= 0) at += size;
        ends[i] = size < 0 ? ~at : at;
    }
}

/* state[p] = min over the hashes of ((hash ^ masks[p]) * factors[p]), mixed once more. */
WIDEST static void permute(const uint32_t *hashes, int64_t count, const uint32_t *masks, const uint32_t *factors,
                           int64_t num_perm, uint32_t *state) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t hash = hashes[i];
        for (int64_t p = 0; p < num_perm; p++) {
            uint32_t v = (hash ^ masks[p]) * factors[p];
            v = (v ^ v >> 15) * 0x2c1b3c6du;
            state[p] = v < state[p] ? v : state[p];
        }
    }
}

typedef struct {
    const uint8_t *at, *end, *classes;
    const uint8_t *start; /* of the token that was read last */
    int class;
} Reader;

/* The hash of the next token, or 0 with `class` SEPARATOR at the end. */
static inline uint64_t next_token(Reader *r) {
    while (r->at < r->end) {
        const uint8_t *start = r->at;
        uint32_t c = decode(&r->at, r->end);
        int class = r->classes[c];
        if (class == SEPARATOR) continue;
        uint64_t sum = c + 1, power = BASE;
        if (class == WORD) {
            while (r->at < r->end) {
                const uint8_t *here = r->at;
                c = decode(&r->at, r->end);
                if (r->classes[c] != WORD) {
                    r->at = here;
                    break;
                }
                sum += (c + 1) * power;
                power *= BASE;
            }
        }
        r->start = start;
        r->class = class;
        return mix(sum);
    }
    r->class = SEPARATOR;
    return 0;
}

/* Signatures [num_texts, num_perm] of normalised texts, and how many shingles each had (with repetitions). A shingle is
   `word_tokens` tokens from a word on or `letter_tokens` from a letter of a script without spaces on; a text shorter than
   its shingles is one shingle; one without tokens has none and a signature of 0xffffffff. */
void qwench_signatures(const uint8_t *texts, const int64_t *offsets, int64_t num_texts, const uint8_t *classes,
                       int64_t word_tokens, int64_t letter_tokens, const uint32_t *masks, const uint32_t *factors,
                       int64_t num_perm, uint32_t *signatures, uint32_t *num_shingles) {
    uint32_t held[HELD];
    uint64_t tokens[MOST_TOKENS];
    uint8_t kinds[MOST_TOKENS];
    const int64_t lengths[3] = {0, word_tokens, letter_tokens};
    for (int64_t text = 0; text < num_texts; text++) {
        uint32_t *state = signatures + text * num_perm;
        memset(state, 0xff, (size_t)num_perm * 4);
        Reader reader = {texts + offsets[text], texts + offsets[text + 1], classes, NULL, SEPARATOR};
        int64_t num_tokens = 0, count = 0;
        uint64_t total = 0;
        for (;;) {
            uint64_t token = next_token(&reader);
            if (reader.class == SEPARATOR) break;
            tokens[num_tokens % MOST_TOKENS] = token;
            kinds[num_tokens % MOST_TOKENS] = (uint8_t)reader.class;
            num_tokens++;
            for (int class = WORD; class <= LETTER; class++) {
                int64_t first = num_tokens - lengths[class];
                if (first < 0 || kinds[first % MOST_TOKENS] != class) continue;
                uint64_t sum = 0;
                for (int64_t i = num_tokens - 1; i >= first; i--) sum = sum * STEP + tokens[i % MOST_TOKENS];
                held[count++] = (uint32_t)(mix(sum) >> 32);
                total++;
            }
            if (count > HELD - 2) {
                permute(held, count, masks, factors, num_perm, state);
                count = 0;
            }
        }
        if (total == 0 && num_tokens) {
            uint64_t sum = 0;
            for (int64_t i = num_tokens - 1; i >= 0; i--) sum = sum * STEP + tokens[i % MOST_TOKENS];
            held[count++] = (uint32_t)(mix(sum) >> 32);
            total++;
        }
        permute(held, count, masks, factors, num_perm, state);
        num_shingles[text] = total < 0xffffffffu ? (uint32_t)total : 0xffffffffu;
    }
}
