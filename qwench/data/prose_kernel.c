/* Counting words and repeated n-grams of a text: the inner loops of `data/prose_rules.py` and `data/repetition.py`. Not a
   Unicode library: what a code point is comes from a table that Python fills. Every result equals that of the Python
   beside it, which is what runs where there is no compiler. `native.py` compiles this file. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Bits of a code point: white space, what makes a word of words, letters and marks, and so on. */
enum { SPACE = 1, NAMED = 2, LETTER = 4, WIDE = 8, THAI_LIKE = 16, WESTERN = 32 };

static const uint64_t BASE = 0x9e3779b97f4a7c15u, STEP = 0xd6e8feb86659fd93u;

static inline uint64_t mix(uint64_t x) {
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* Counts of the text (code points below 0x110000, their bits in `bits`), in the order of TextCounts. */
void qwench_count(const uint32_t *text, int64_t length, const uint8_t *bits, int64_t *counts) {
    int64_t words = 0, spaces = 0, named = 0, letters = 0, wide = 0, thai_like = 0, western = 0;
    int64_t line = -1, longest = 0;
    uint32_t some = 0, before = SPACE;
    for (int64_t i = 0; i < length; i++) {
        uint32_t now = bits[text[i]], begins = before & ~now, ends = now & ~before;
        words += begins & SPACE;
        named += (ends & SPACE) & some / NAMED;
        some = now & SPACE ? 0 : some | (now & NAMED);
        western += (ends & WESTERN) / WESTERN;
        spaces += now & SPACE;
        letters += (now & LETTER) / LETTER;
        wide += (now & WIDE) / WIDE;
        thai_like += (now & THAI_LIKE) / THAI_LIKE;
        before = now;
        if (text[i] == '\n') {
            longest = i - line - 1 > longest ? i - line - 1 : longest;
            line = i;
        }
    }
    longest = length - line - 1 > longest ? length - line - 1 : longest;
    named += some / NAMED;
    counts[0] = words;
    counts[1] = length - spaces;
    counts[2] = words - named;
    counts[3] = letters;
    counts[4] = wide;
    counts[5] = thai_like;
    counts[6] = western;
    counts[7] = longest;
}

typedef struct {
    uint64_t gram;
    int64_t count; /* 0: free */
} Slot;

typedef struct {
    int64_t num;       /* tokens */
    int64_t chars;     /* characters in all of them, at least 1 */
    uint64_t *prefix;  /* [num + 1] hash of the first tokens */
    int64_t *ends;     /* [num + 1] characters of the first tokens */
    int64_t *places;   /* [num] where an n-gram of the last length begins that stands there more than once */
    int64_t num_places;
    int64_t *slots;    /* [num] of the places in the table */
    uint8_t *repeated; /* [num + 1] the same as flags */
    Slot *table;       /* [capacity] */
    uint64_t capacity;
} Tokens;

/* Words, or with `characters` the characters that are no white space. */
static void tokenise(Tokens *t, const uint32_t *text, int64_t length, const uint8_t *bits, int characters) {
    int64_t num = 0, chars = 0;
    uint64_t hash = 0;
    int inside = 0;
    t->prefix[0] = 0;
    t->ends[0] = 0;
    for (int64_t i = 0; i <= length; i++) {
        int space = i == length || (bits[text[i]] & SPACE);
        if (inside && (space || characters)) {
            t->prefix[num + 1] = t->prefix[num] * STEP + mix(hash + BASE);
            t->ends[++num] = chars;
            inside = 0;
        }
        if (!space) {
            hash = (inside ? hash * BASE : 0) + text[i] + 1;
            inside = 1;
            chars++;
        }
    }
    t->num = num;
    t->chars = chars > 0 ? chars : 1;
}

/* Counts the n-grams of `size` tokens at the places where both the one of `size - grown` tokens there and the one behind
   it are repeated (grown = size: at all places), and leaves the places of the repeated ones, `slots` aligned with them.
   Returns how often the most frequent stands there. */
static int64_t count_grams(Tokens *t, int64_t size, int64_t grown) {
    int64_t num = 0, most = 0, last = t->num - size;
    if (grown == size) {
        for (int64_t i = 0; i <= last; i++) t->places[num++] = i;
    } else {
        for (int64_t j = 0; j < t->num_places; j++) {
            int64_t i = t->places[j];
            if (i <= last && t->repeated[i + grown]) t->places[num++] = i;
        }
    }
    uint64_t capacity = 16, power = 1;
    while (capacity < 2 * (uint64_t)num) capacity *= 2;
    for (int64_t i = 0; i < size; i++) power *= STEP;
    memset(t->table, 0, capacity * sizeof(Slot));
    for (int64_t j = 0; j < num; j++) {
        int64_t i = t->places[j];
        uint64_t gram = mix(t->prefix[i + size] - t->prefix[i] * power);
        uint64_t slot = gram & (capacity - 1);
        while (t->table[slot].count && t->table[slot].gram != gram) slot = (slot + 1) & (capacity - 1);
        t->table[slot].gram = gram;
        int64_t count = ++t->table[slot].count;
        most = count > most ? count : most;
        t->slots[j] = (int64_t)slot;
    }
    memset(t->repeated, 0, (size_t)t->num + 1);
    t->num_places = 0;
    for (int64_t j = 0; j < num; j++) {
        if (t->table[t->slots[j]].count < 2) continue;
        t->repeated[t->places[j]] = 1;
        t->slots[t->num_places] = t->slots[j];
        t->places[t->num_places++] = t->places[j];
    }
    return most;
}

/* Characters in the most frequent n-gram, the longest of those that stand there equally often. */
static double top_share(const Tokens *t, int64_t size, int64_t most) {
    int64_t longest = 0;
    for (int64_t j = 0; j < t->num_places; j++) {
        int64_t i = t->places[j], chars = t->ends[i + size] - t->ends[i];
        if (t->table[t->slots[j]].count == most && chars > longest) longest = chars;
    }
    return (double)(most * longest) / (double)t->chars;
}

/* Characters that lie in an n-gram which stood there before, each counted once. Uses the table up. */
static double duplicate_share(Tokens *t, int64_t size) {
    int64_t covered = 0, until = 0;
    for (int64_t j = 0; j < t->num_places; j++) {
        int64_t i = t->places[j], *count = &t->table[t->slots[j]].count;
        if (*count >= 0) {
            *count = -1; /* the first */
            continue;
        }
        covered += t->ends[i + size] - t->ends[i > until ? i : until];
        until = i + size;
    }
    return (double)covered / (double)t->chars;
}

/* The first rule that the repeated n-grams of a text break: 0 if none, else the place from 1 on among the `num_top`
   limits of the most frequent 2-, 3- ... gram and then the `num_duplicate` limits of duplicated 5-, 6- ... grams; its
   share in `value`. An n-gram has `step` times n tokens: words, or characters if `characters`. -1: no memory. */
int64_t qwench_repeated_grams(const uint32_t *text, int64_t length, const uint8_t *bits, int64_t characters,
                              int64_t step, const double *top_limits, int64_t num_top,
                              const double *duplicate_limits, int64_t num_duplicate, double *value) {
    Tokens t = {0};
    size_t room = 2;
    for (int64_t i = 0; i < length; i++)
        room += !(bits[text[i]] & SPACE) && (characters || !i || (bits[text[i - 1]] & SPACE));
    uint64_t capacity = 16;
    while (capacity < 2 * room) capacity *= 2;
    uint64_t *memory = malloc(room * (4 * sizeof(uint64_t) + 1) + capacity * sizeof(Slot));
    if (!memory) return -1;
    t.table = (Slot *)memory;
    t.prefix = memory + capacity * sizeof(Slot) / sizeof(uint64_t);
    t.ends = (int64_t *)(t.prefix + room);
    t.places = t.ends + room;
    t.slots = t.places + room;
    t.repeated = (uint8_t *)(t.slots + room);
    tokenise(&t, text, length, bits, characters != 0);
    int64_t broken = 0, before = 0;
    for (int64_t rule = 0; rule < num_top + num_duplicate && !broken; rule++) {
        int is_top = rule < num_top;
        int64_t size = step * (is_top ? rule + 2 : rule - num_top + 5);
        if (size >= t.num) continue;
        int64_t most = count_grams(&t, size, before && before < size ? size - before : size);
        before = size;
        if (most < 2) continue;
        double share, limit;
        if (is_top) {
            share = top_share(&t, size, most);
            limit = top_limits[rule];
        } else {
            double least = limit = duplicate_limits[rule - num_top];
            for (int64_t i = rule - num_top; i < num_duplicate; i++)
                least = duplicate_limits[i] < least ? duplicate_limits[i] : least;
            share = duplicate_share(&t, size);
            if (share <= least) break; /* a longer one covers no more than the shorter ones in it */
        }
        if (share > limit) {
            broken = rule + 1;
            *value = share;
        }
    }
    free(memory);
    return broken;
}
