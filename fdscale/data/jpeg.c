/* A rectangle of a JPEG, without decoding what lies outside of it.
 *
 * The work is done by the libjpeg-turbo that Pillow itself decodes with: jpeg.py finds its functions and hands them
 * over, so nothing is linked here and no header of the library is needed. What is declared is version 6.2 of its
 * interface; jpeg_CreateDecompress refuses any other by number and by the size of its structure. Only the Huffman codes
 * of ordinary files (one scan, no restarts) are read here: that is more than half of the work, since even what is
 * skipped has to be read, and a table that gives two coefficients at a look does it in two thirds of the time.
 *
 * Both entry points return 0 only when everything about the file was in order; at the first error or warning they give
 * up (UNSURE), and Pillow, which decodes the whole file, decides what it is worth. Neither trusts a byte of the file.
 */
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define FROM_BIG_ENDIAN(word) __builtin_bswap64(word)
#else
#define FROM_BIG_ENDIAN(word) (word)
#endif

enum { OK = 0, UNSURE = 1 };
enum { VERSION = 62, GRAYSCALE = 1, RGB = 2, YCBCR = 3, EOI = 0xD9, RST0 = 0xD0, RST7 = 0xD7 };
enum { ROWS = 2, COLUMNS = 2 };   /* decoded around the rectangle: chroma is interpolated from its neighbours */
enum { NARROW = 16 };             /* columns around a narrower one: the library does not interpolate tiny widths */
enum { AT_ONCE = 8 };             /* rows asked for in one call */
enum { WIDEST_MCU = 32 };         /* columns: a crop begins at the edge of a block of up to 4 x 8 */
enum { SMOOTHED = 10 };           /* coefficients whose precision decides on smoothing between blocks (jdcoefct.c) */

struct decompress;
struct huffman;
struct component;

struct error_mgr {
    void (*error_exit)(struct decompress *);
    void (*emit_message)(struct decompress *, int level);
    void (*output_message)(struct decompress *);
    void (*format_message)(struct decompress *, char *);
    void (*reset)(struct decompress *);
    int code;
    union { int i[8]; char s[80]; } parameters;
    int trace_level;
    long warnings;
    const char *const *messages;
    int last_message;
    const char *const *more_messages;
    int first_more, last_more;
};

struct source_mgr {
    const unsigned char *next;
    size_t left;
    void (*init)(struct decompress *);
    int (*fill)(struct decompress *);
    void (*skip)(struct decompress *, long);
    int (*resync)(struct decompress *, int);
    void (*term)(struct decompress *);
};

struct decompress {  /* jpeg_decompress_struct, in its order; enumerations and "boolean" are int */
    struct error_mgr *err;
    void *mem, *progress, *client;
    int is_decompressor, state;
    struct source_mgr *src;
    unsigned width, height;
    int components, color_space, out_color_space;
    unsigned scale_num, scale_denom;
    double gamma;
    int buffered, raw, dct_method, fancy_upsampling, block_smoothing, quantize, dither, two_pass, colors, enable[3];
    unsigned out_width, out_height;
    int out_color_components, out_components, rec_outbuf_height, actual_colors;
    void *colormap;
    unsigned out_scanline;
    int in_scan;
    unsigned in_row;
    int out_scan;
    unsigned out_row;
    int (*coef_bits)[64];
    void *quant_tables[4];
    struct huffman *dc_tables[4], *ac_tables[4];
    int precision;
    void *comp_info;
    int progressive, arithmetic;
    unsigned char arith_dc_l[16], arith_dc_u[16], arith_ac_k[16];
    unsigned restart_interval;
    int saw_jfif;
    unsigned char jfif_major, jfif_minor, density_unit;
    unsigned short x_density, y_density;
    int saw_adobe;
    unsigned char adobe_transform;
    int ccir601;
    void *markers;
    int max_h, max_v, min_dct_size;
    unsigned imcu_rows;
    void *range_limit;
    int comps_in_scan;
    struct component *scan_comps[4];
    unsigned mcus_per_row, mcu_rows;
    int blocks_in_mcu, mcu_membership[10], ss, se, ah, al;
    int unread_marker;
    void *modules[11];
};

struct huffman { unsigned char counts[17], symbols[256]; int sent; };   /* JHUFF_TBL */
struct component { int id, index, h, v, quant, dc, ac; };               /* the beginning of jpeg_component_info */
struct entropy {                                                        /* jpeg_entropy_decoder (jpegint.h) */
    void (*start_pass)(struct decompress *);
    int (*decode_mcu)(struct decompress *, int16_t (**blocks)[64]);
};
enum { ENTROPY = 6 };  /* its place among the modules */

/* In the order of FUNCTIONS in jpeg.py. */
struct library {
    struct error_mgr *(*std_error)(struct error_mgr *);
    void (*create)(struct decompress *, int version, size_t size);
    void (*mem_src)(struct decompress *, const unsigned char *, unsigned long);
    int (*read_header)(struct decompress *, int require_image);
    int (*start)(struct decompress *);
    void (*crop)(struct decompress *, unsigned *x, unsigned *width);
    unsigned (*skip)(struct decompress *, unsigned rows);
    unsigned (*read)(struct decompress *, unsigned char **rows, unsigned count);
    void (*destroy)(struct decompress *);
};

enum { LOOK = 10, LONGEST = 16 };  /* bits looked up at once; bits of a code */
enum { VALUE = 1 << 12, END = 1 << 13, SYMBOL = 1 << 14 };

/* What the next LOOK bits begin with. The lowest 8 bits say how many to take. VALUE: a whole coefficient, bits 16 to 31,
 * after as many zeros as bits 8 to 11 say. END: no more coefficients in the block. SYMBOL: bits 16 to 23, of a
 * coefficient whose own bits reach further. 0: a longer code. */
struct table {
    uint32_t at[1 << LOOK];
    int32_t last[LONGEST + 1], offset[LONGEST + 1];  /* by length: last code (-1: none), from code to place */
    const unsigned char *symbols;
};

/* The same two at a time, where the bits hold two: `first` after `zeros` zeros, and `second` `further` places on (0 and
 * 0 if there is none). take: bits, 0 for whatever is no value and no end. */
struct pair { int16_t first, second; uint8_t take, zeros, further, ends; };

struct bits {
    uint64_t window;  /* the next bits, highest first */
    int count;        /* how many of them are there */
    int made_up;      /* how many of these stand for data that are missing: zeros after a marker or the end */
    const unsigned char *at, *end;
};

struct job {
    struct error_mgr err;  /* first, so that the library's pointer to it is one to the job */
    struct decompress c;
    jmp_buf leave;
    int own;  /* whether the codes are read here */
    struct bits bits;
    int level[4];  /* of the last block of each component */
    unsigned column, first_column, last_column;  /* in MCUs: what comes next, what is wanted */
    struct table dc[4], ac[4];  /* from here on not cleared */
    struct pair pairs[4][1 << LOOK];
};

static _Noreturn void give_up(struct decompress *c) { longjmp(((struct job *)c->err)->leave, 1); }

static void on_message(struct decompress *c, int level) {
    if (level < 0) give_up(c);  /* a warning: corrupt or missing data */
}

static void silent(struct decompress *c) { (void)c; }

static void open_file(const struct library *lib, struct job *job, const unsigned char *data, size_t size) {
    job->c.err = lib->std_error(&job->err);
    job->err.error_exit = give_up;
    job->err.emit_message = on_message;
    job->err.output_message = silent;
    lib->create(&job->c, VERSION, sizeof job->c);
    lib->mem_src(&job->c, data, size);
    lib->read_header(&job->c, 1);
}

static int many_scans(const struct decompress *c) { return c->progressive || c->comps_in_scan < c->components; }

/* Width, height, bytes before the pixels, and whether there may be several scans. */
int fdscale_jpeg_head(const struct library *lib, const unsigned char *data, size_t size, int out[4]) {
    struct job job;
    memset(&job, 0, offsetof(struct job, dc));
    if (setjmp(job.leave)) {
        lib->destroy(&job.c);
        return UNSURE;
    }
    open_file(lib, &job, data, size);
    int plain = job.c.precision == 8 && ((job.c.components == 1 && job.c.color_space == GRAYSCALE) ||
        (job.c.components == 3 && (job.c.color_space == YCBCR || job.c.color_space == RGB)));
    out[0] = (int)job.c.width;
    out[1] = (int)job.c.height;
    out[2] = (int)(size - job.c.src->left);
    out[3] = many_scans(&job.c);
    lib->destroy(&job.c);
    return plain ? OK : UNSURE;
}

static void make_table(struct table *t, const struct huffman *from) {
    int32_t code = 0, place = 0;
    memset(t->at, 0, sizeof t->at);
    t->symbols = from->symbols;
    for (int length = 1; length <= LONGEST; length++, code <<= 1) {
        t->offset[length] = place - code;
        for (int i = 0; i < from->counts[length]; i++, code++, place++) {
            int symbol = from->symbols[place], run = symbol >> 4, size = symbol & 15, spare = LOOK - length;
            for (int rest = 0; spare >= 0 && rest < 1 << spare; rest++) {
                uint32_t *entry = &t->at[(code << spare) + rest];
                if (size == 0) {
                    *entry = (uint32_t)(run == 15 ? SYMBOL | symbol << 16 | length : END | length);
                } else if (size <= spare) {
                    int value = rest >> (spare - size);
                    if (value < 1 << (size - 1)) value -= (1 << size) - 1;
                    *entry = (uint32_t)value << 16 | VALUE | run << 8 | (length + size);
                } else {
                    *entry = SYMBOL | (uint32_t)symbol << 16 | length;
                }
            }
        }
        t->last[length] = from->counts[length] ? code - 1 : -1;
    }
}

static void make_pairs(struct pair *pairs, const struct table *t) {
    for (uint32_t bits = 0; bits < 1 << LOOK; bits++) {
        uint32_t one = t->at[bits], two = 0, length = one & 0xFF;
        struct pair p = {0};
        if (one & VALUE) {
            two = t->at[bits << length & ((1 << LOOK) - 1)];
            if (!(two & (VALUE | END)) || length + (two & 0xFF) > LOOK) two = 0;  /* it needs bits that are not here */
            p.first = (int16_t)(one >> 16);
            p.zeros = one >> 8 & 15;
        }
        if (two & VALUE) {
            p.second = (int16_t)(two >> 16);
            p.further = 1 + (two >> 8 & 15);
        }
        if (one & (VALUE | END)) p.take = (uint8_t)(length + (two & 0xFF));
        p.ends = ((one | two) & END) != 0;
        pairs[bits] = p;
    }
}

/* The window filled up, with zeros where data are missing. */
static struct bits refilled_slowly(struct bits b) {
    while (b.count < 56) {
        uint64_t byte = 0;
        if (b.at < b.end && *b.at != 0xFF) {
            byte = *b.at++;
        } else if (b.end - b.at >= 2 && b.at[1] == 0) {
            byte = 0xFF;
            b.at += 2;
        } else {
            b.made_up += 8;
        }
        b.window |= byte << (56 - b.count);
        b.count += 8;
    }
    return b;
}

/* At least 56 bits, whatever becomes of the data. */
static inline void refill(struct bits *b) {
    if (b->end - b->at >= 8) {
        uint64_t next;
        memcpy(&next, b->at, 8);
        if (!((~next - 0x0101010101010101u) & next & 0x8080808080808080u)) {  /* no byte is 0xFF */
            b->window |= FROM_BIG_ENDIAN(next) >> b->count;
            b->at += (63 - b->count) >> 3;
            b->count |= 56;
            return;
        }
    }
    *b = refilled_slowly(*b);
}

static inline void take(struct bits *b, int n) {
    b->window <<= n;
    b->count -= n;
}

static inline int take_symbol(struct decompress *c, struct bits *b, const struct table *t, uint32_t entry) {
    if (entry & SYMBOL) {
        take(b, entry & 0xFF);
        return entry >> 16 & 0xFF;
    }
    for (int length = LOOK + 1; length <= LONGEST; length++) {
        int32_t code = (int32_t)(b->window >> (64 - length));
        if (code <= t->last[length]) {
            take(b, length);
            return t->symbols[code + t->offset[length]];
        }
    }
    give_up(c);
}

static inline int take_value(struct bits *b, int size) {
    int value = (int)(b->window >> (64 - size));
    take(b, size);
    return value < 1 << (size - 1) ? value - (1 << size) + 1 : value;
}

static const unsigned char ZIGZAG[64] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6,
    7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46,
    53, 60, 61, 54, 47, 55, 62, 63};

/* One block, kept or passed over. Inlined, so that the bits stay in registers and `keep` is no question. */
static inline __attribute__((always_inline)) void read_block(
    struct decompress *c, struct bits *b, const struct table *dc, const struct table *ac, const struct pair *pairs,
    int *level, int16_t *block, int keep) {
    refill(b);
    uint32_t entry = dc->at[b->window >> (64 - LOOK)];
    if (entry & (VALUE | END)) {
        take(b, entry & 0xFF);
        *level += (int32_t)entry >> 16;
    } else {
        int size = take_symbol(c, b, dc, entry) & 15;
        if (size) *level += take_value(b, size);
    }
    if (*level != (int16_t)*level) give_up(c);
    if (keep) block[0] = (int16_t)*level;
    for (int k = 1; k < 64;) {
        refill(b);
        for (int i = 0; i < 4; i++) {  /* 4 x LOOK bits at most: no need to look how many there are */
            struct pair p = pairs[b->window >> (64 - LOOK)];
            int at = k + p.zeros, then = at + p.further;
            if (p.take == 0 || then + p.ends > 63) break;  /* after the last coefficient the next block begins */
            take(b, p.take);
            if (keep) {
                block[ZIGZAG[then]] = p.second;  /* first, so that it does not count where there is none */
                block[ZIGZAG[at]] = p.first;
            }
            k = then + 1;
            if (p.ends || k == 64) return;
        }
        refill(b);
        entry = ac->at[b->window >> (64 - LOOK)];
        if (entry & VALUE) {
            take(b, entry & 0xFF);
            k += entry >> 8 & 15;
            if (k > 63) give_up(c);
            if (keep) block[ZIGZAG[k]] = (int16_t)(entry >> 16);
            k++;
            continue;
        }
        if (entry & END) {
            take(b, entry & 0xFF);
            return;
        }
        int symbol = take_symbol(c, b, ac, entry), size = symbol & 15;
        if (size == 0 && symbol >> 4 != 15) return;
        k += symbol >> 4;
        if (size) {
            int value = take_value(b, size);
            if (k > 63) give_up(c);
            if (keep) block[ZIGZAG[k]] = (int16_t)value;
        }
        k++;
    }
}

/* The library's decode_mcu: the next blocks (zeros so far) of all components, or past them if there are none. */
static int read_mcu(struct decompress *c, int16_t (**blocks)[64]) {
    struct job *job = (struct job *)c->err;
    struct bits b = job->bits;
    int wanted = blocks != NULL && job->column >= job->first_column && job->column <= job->last_column;
    for (int i = 0; i < c->blocks_in_mcu; i++) {
        int which = c->mcu_membership[i];
        const struct component *of = c->scan_comps[which];
        const struct table *dc = &job->dc[of->dc], *ac = &job->ac[of->ac];
        const struct pair *pairs = job->pairs[of->ac];
        if (wanted) read_block(c, &b, dc, ac, pairs, &job->level[which], *blocks[i], 1);
        else read_block(c, &b, dc, ac, pairs, &job->level[which], NULL, 0);
    }
    if (b.count < b.made_up) give_up(c);  /* the data are missing */
    job->bits = b;
    if (++job->column == c->mcus_per_row) job->column = 0;
    return 1;
}

/* From now on; columns left .. left + width - 1 are wanted. */
static void read_codes_here(struct job *job, unsigned left, unsigned width) {
    struct decompress *c = &job->c;
    for (int i = 0; i < c->comps_in_scan; i++) {
        const struct component *of = c->scan_comps[i];
        make_table(&job->dc[of->dc], c->dc_tables[of->dc]);
        make_table(&job->ac[of->ac], c->ac_tables[of->ac]);
        make_pairs(job->pairs[of->ac], &job->ac[of->ac]);
    }
    job->bits.at = c->src->next;
    job->bits.end = c->src->next + c->src->left;
    job->last_column = c->mcus_per_row;
    if (c->comps_in_scan == 3) {  /* a grey image is counted in single blocks, which are not worth the trouble */
        unsigned pixels = (unsigned)(c->max_h * c->min_dct_size);  /* columns of an MCU */
        job->first_column = left / pixels;
        job->last_column = (left + width - 1) / pixels;
    }
    job->own = 1;
    ((struct entropy *)c->modules[ENTROPY])->decode_mcu = read_mcu;
}

/* Whether the undecoded rest of the only scan leads to the end of the image: no other marker, no missing end. */
static int ends_well(const struct job *job) {
    const struct decompress *c = &job->c;
    const unsigned char *at = job->own ? job->bits.at : c->src->next, *end = c->src->next + c->src->left;
    int marker = c->unread_marker;
    while (marker == 0 || (marker >= RST0 && marker <= RST7)) {
        at = memchr(at, 0xFF, (size_t)(end - at));
        if (at == NULL) return 0;
        while (at < end && *at == 0xFF) at++;
        if (at == end) return 0;
        marker = *at++;
    }
    return marker == EOI;
}

/* The rectangle of the image at 1/denominator of its size, as rows of width x 3 bytes RGB. */
int fdscale_jpeg_part(const struct library *lib, const unsigned char *data, size_t size, unsigned denominator,
                      unsigned left, unsigned top, unsigned width, unsigned height, unsigned char *out) {
    struct job job;
    unsigned margin = width < NARROW ? NARROW : COLUMNS, room = width + 2 * margin + WIDEST_MCU;
    unsigned char *rows[AT_ONCE];
    rows[0] = malloc((size_t)room * 3 * AT_ONCE);
    if (rows[0] == NULL) return UNSURE;
    for (int i = 1; i < AT_ONCE; i++) rows[i] = rows[0] + (size_t)room * 3 * i;
    memset(&job, 0, offsetof(struct job, dc));
    if (setjmp(job.leave)) {
        lib->destroy(&job.c);
        free(rows[0]);
        return UNSURE;
    }
    struct decompress *c = &job.c;
    open_file(lib, &job, data, size);
    c->out_color_space = RGB;
    c->scale_num = 1;
    c->scale_denom = denominator;
    lib->start(c);
    if ((size_t)left + width > c->out_width || (size_t)top + height > c->out_height || c->out_components != 3)
        give_up(c);
    for (int i = 0; c->progressive && i < c->components; i++)
        for (int k = 0; k < SMOOTHED; k++)
            if (c->coef_bits[i][k]) give_up(c);  /* scans are missing: neighbours beyond the margin would count */

    unsigned x = left > margin ? left - margin : 0;
    unsigned end = c->out_width - left - width > margin ? left + width + margin : c->out_width, span = end - x;
    if (span < c->out_width) lib->crop(c, &x, &span);
    if (!many_scans(c) && !c->arithmetic && !c->restart_interval) read_codes_here(&job, x, span);
    if (x > left || x + span < left + width || span > room) give_up(c);

    if (top > ROWS && lib->skip(c, top - ROWS) != top - ROWS) give_up(c);
    while (c->out_scanline < top + height) {
        unsigned y = c->out_scanline, wanted = top + height - y;
        unsigned got = lib->read(c, rows, wanted < AT_ONCE ? wanted : AT_ONCE);
        if (got == 0) give_up(c);
        for (unsigned i = 0; i < got; i++)
            if (y + i >= top)
                memcpy(out + (size_t)(y + i - top) * width * 3, rows[i] + (size_t)(left - x) * 3, (size_t)width * 3);
    }
    int well = many_scans(c) || ends_well(&job);
    lib->destroy(c);
    free(rows[0]);
    return well ? OK : UNSURE;
}
