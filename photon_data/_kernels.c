/* Linear interpolation for photon_data/interpolate.py. Its numpy code is the reference: here are the same operations on
   the same types in the same order, so the same bits. Hence neither -ffast-math nor contraction to FMA (setup.py).

   Arrays come through the buffer protocol. Python checks their types; shapes and indices are checked here, so that no
   memory outside of them is touched. The GIL is released while voxels are made. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Raised with every change of what a function takes or gives; interpolate.py takes no extension of another one. */
#define VERSION 2

/* Loops are compiled twice where the loader can choose: wider registers, the same results. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

/* Buffers */

enum { MOST = 8 };
typedef struct {
    Py_buffer view[MOST];
    int count;
} Buffers;

static void release(Buffers *b)
{
    while (b->count > 0)
        PyBuffer_Release(&b->view[--b->count]);
}

/* Return the buffer of an array of `ndim` axes and items of `size` bytes (0: any); NULL with an exception set. */
static Py_buffer *get(Buffers *b, PyObject *array, int ndim, Py_ssize_t size, int flags)
{
    Py_buffer *view = &b->view[b->count];
    if (PyObject_GetBuffer(array, view, flags | PyBUF_FORMAT) < 0)
        return NULL;
    b->count++;
    if (view->ndim != ndim || (size && view->itemsize != size)) {
        PyErr_Format(PyExc_ValueError, "expected %d axes of %zd bytes an item, found %d of %zd", ndim, size, view->ndim,
                     view->itemsize);
        return NULL;
    }
    return view;
}

/* Tell whether items are of one of these types, in native byte order and aligned: only then is it one letter. */
static int is_one_of(const char *types, const Py_buffer *view)
{
    return view->format && view->format[0] && !view->format[1] && strchr(types, view->format[0]) != NULL;
}

/* How outputs along one axis sample the input: x[low] + weight * (x[high] - x[low]). */
typedef struct {
    Py_ssize_t n;
    const Py_ssize_t *low, *high;
    const float *weight;
} Map;

/* Fill a map from a tuple (low, high, weight), indices below n_in; return 0, or -1 with an exception set. */
static int get_map(Buffers *b, PyObject *tuple, Py_ssize_t n_in, Map *map)
{
    PyObject *arrays[3];
    if (!PyArg_ParseTuple(tuple, "OOO", &arrays[0], &arrays[1], &arrays[2]))
        return -1;
    Py_buffer *low = get(b, arrays[0], 1, sizeof(Py_ssize_t), PyBUF_C_CONTIGUOUS);
    Py_buffer *high = low ? get(b, arrays[1], 1, sizeof(Py_ssize_t), PyBUF_C_CONTIGUOUS) : NULL;
    Py_buffer *weight = high ? get(b, arrays[2], 1, sizeof(float), PyBUF_C_CONTIGUOUS) : NULL;
    if (!weight)
        return -1;
    *map = (Map){low->shape[0], low->buf, high->buf, weight->buf};
    int bad = high->shape[0] != map->n || weight->shape[0] != map->n;
    for (Py_ssize_t i = 0; i < map->n && !bad; i++)
        bad = map->low[i] < 0 || map->low[i] >= n_in || map->high[i] < 0 || map->high[i] >= n_in;
    if (bad)
        PyErr_SetString(PyExc_ValueError, "expected indices within the array, and as many weights");
    return -bad;
}

/* Rows */

WIDE static void to_float(const void *source, char type, Py_ssize_t n, float *restrict out)
{
#define CASE(letter, T) \
    case letter: \
        for (Py_ssize_t i = 0; i < n; i++) \
            out[i] = (float)((const T *)source)[i]; \
        break;
    switch (type) {
        CASE('b', signed char) CASE('B', unsigned char) CASE('h', short) CASE('H', unsigned short)
        CASE('i', int) CASE('I', unsigned int) CASE('l', long) CASE('L', unsigned long)
        CASE('q', long long) CASE('Q', unsigned long long) CASE('f', float) CASE('d', double)
    }
#undef CASE
}

WIDE static void lerp(const float *low, const float *high, float weight, Py_ssize_t n, float *restrict out)
{
    for (Py_ssize_t i = 0; i < n; i++)
        out[i] = low[i] + weight * (high[i] - low[i]);
}

WIDE static void lerp_short(const short *low, const short *high, float weight, Py_ssize_t n, float *restrict out)
{
    for (Py_ssize_t i = 0; i < n; i++)
        out[i] = (float)low[i] + weight * ((float)high[i] - (float)low[i]);
}

WIDE static void sample(const float *row, const int *low, const int *high, const float *weight, float slope,
                        float intercept, Py_ssize_t n, float *restrict out)
{
    for (Py_ssize_t i = 0; i < n; i++) {
        float from = row[low[i]], to = row[high[i]];
        out[i] = (from + weight[i] * (to - from)) * slope + intercept;
    }
}

/* Round to nearest, ties to even, as rint does: the sum has no room for fractions. Values that are too large for that
   stay beyond int16, hence beyond every window. */
static inline float nearest(float v)
{
    return (v + 12582912.0f) - 12582912.0f;
}

WIDE static void round_clip(const float *row, float low, float high, Py_ssize_t n, short *restrict out)
{
    for (Py_ssize_t i = 0; i < n; i++) {
        float v = nearest(row[i]);
        v = v < low ? low : v;
        v = v > high ? high : v;
        out[i] = (short)(int)v;
    }
}

/* Planes */

/* Where a plane's rows come from: a plane of any type, or two of int16 to be mixed. */
typedef struct {
    const char *low, *high;
    float weight;
    char type;
    Py_ssize_t width, row_bytes;
} Plane;

/* Memory for a row of a plane twice, for their mixture, for a row of the output, and for its map of columns. */
typedef struct {
    float *rows[2], *mixed, *out;
    Py_ssize_t held[2];
    int *low, *high;
} Scratch;

static int allocate(Scratch *s, Py_ssize_t width, const Map *columns)
{
    float *floats = malloc((3 * width + columns->n + 1) * sizeof(float));
    int *ints = malloc((2 * columns->n + 1) * sizeof(int));
    *s = (Scratch){{floats, floats + width}, floats + 2 * width, floats + 3 * width, {-1, -1}, ints, ints + columns->n};
    if (!floats || !ints) {
        free(floats);
        free(ints);
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < columns->n; i++) {
        s->low[i] = (int)columns->low[i];
        s->high[i] = (int)columns->high[i];
    }
    return 0;
}

static void deallocate(Scratch *s)
{
    free(s->rows[0]);
    free(s->low);
}

/* Return row y of the plane as float; it is made unless it is held. The row `other` stays held. */
static const float *row_of(const Plane *p, Scratch *s, Py_ssize_t y, Py_ssize_t other)
{
    int k = s->held[0] == y ? 0 : s->held[1] == y ? 1 : s->held[0] == other;
    if (s->held[k] != y) {
        const char *low = p->low + y * p->row_bytes;
        if (p->high)
            lerp_short((const short *)low, (const short *)(p->high + y * p->row_bytes), p->weight, p->width, s->rows[k]);
        else
            to_float(low, p->type, p->width, s->rows[k]);
        s->held[k] = y;
    }
    return s->rows[k];
}

/* Put row r of the output into `out`: rows first, then columns, then slope and intercept. */
static void output_row(const Plane *p, Scratch *s, const Map *rows, const Map *columns, Py_ssize_t r, float slope,
                       float intercept, float *out)
{
    const float *low = row_of(p, s, rows->low[r], rows->high[r]);
    const float *high = row_of(p, s, rows->high[r], rows->low[r]);
    lerp(low, high, rows->weight[r], p->width, s->mixed);
    sample(s->mixed, s->low, s->high, columns->weight, slope, intercept, columns->n, out);
}

static PyObject *plane(PyObject *self, PyObject *args)
{
    PyObject *source, *row_map, *column_map, *target;
    float slope, intercept;
    Buffers b = {.count = 0};
    Map rows, columns;
    Scratch s;
    if (!PyArg_ParseTuple(args, "OOOffO", &source, &row_map, &column_map, &slope, &intercept, &target))
        return NULL;
    Py_buffer *in = get(&b, source, 2, 0, PyBUF_C_CONTIGUOUS);
    Py_buffer *out = in ? get(&b, target, 2, sizeof(float), PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) : NULL;
    if (!out || get_map(&b, row_map, in->shape[0], &rows) || get_map(&b, column_map, in->shape[1], &columns))
        goto failed;
    if (out->shape[0] != rows.n || out->shape[1] != columns.n || !is_one_of("bBhHiIlLqQfd", in)) {
        PyErr_SetString(PyExc_ValueError, "expected an output of the maps' shape, and aligned numbers");
        goto failed;
    }
    if (allocate(&s, in->shape[1], &columns))
        goto failed;
    Plane p = {in->buf, NULL, 0, in->format[0], in->shape[1], in->shape[1] * in->itemsize};
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t r = 0; r < rows.n; r++)
        output_row(&p, &s, &rows, &columns, r, slope, intercept, (float *)out->buf + r * columns.n);
    Py_END_ALLOW_THREADS
    deallocate(&s);
    release(&b);
    Py_RETURN_NONE;
failed:
    release(&b);
    return NULL;
}

static PyObject *between(PyObject *self, PyObject *args)
{
    PyObject *sources[2], *target;
    float weight, low, high;
    Buffers b = {.count = 0};
    if (!PyArg_ParseTuple(args, "OOfffO", &sources[0], &sources[1], &weight, &low, &high, &target))
        return NULL;
    Py_buffer *from = get(&b, sources[0], 2, sizeof(float), PyBUF_C_CONTIGUOUS);
    Py_buffer *to = from ? get(&b, sources[1], 2, sizeof(float), PyBUF_C_CONTIGUOUS) : NULL;
    Py_buffer *out = to ? get(&b, target, 2, sizeof(short), PyBUF_STRIDES | PyBUF_WRITABLE) : NULL;
    if (!out)
        goto failed;
    Py_ssize_t ny = out->shape[0], nx = out->shape[1];
    if (from->shape[0] != ny || from->shape[1] != nx || to->shape[0] != ny || to->shape[1] != nx) {
        PyErr_SetString(PyExc_ValueError, "expected three planes of one shape");
        goto failed;
    }
    float *mixed = malloc((nx + 1) * sizeof(float));
    short *rounded = malloc((nx + 1) * sizeof(short));
    if (mixed && rounded) {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t y = 0; y < ny; y++) {
            char *row = (char *)out->buf + y * out->strides[0];
            int whole = out->strides[1] == sizeof(short);
            lerp((const float *)from->buf + y * nx, (const float *)to->buf + y * nx, weight, nx, mixed);
            round_clip(mixed, low, high, nx, whole ? (short *)row : rounded);
            for (Py_ssize_t x = 0; x < nx && !whole; x++)
                *(short *)(row + x * out->strides[1]) = rounded[x];
        }
        Py_END_ALLOW_THREADS
    }
    else
        PyErr_NoMemory();
    free(mixed);
    free(rounded);
    if (PyErr_Occurred())
        goto failed;
    release(&b);
    Py_RETURN_NONE;
failed:
    release(&b);
    return NULL;
}

static PyObject *resize(PyObject *self, PyObject *args)
{
    PyObject *source, *maps[3], *target;
    Buffers b = {.count = 0};
    Buffers more = {.count = 0};
    Map depth, rows, columns;
    Scratch s;
    if (!PyArg_ParseTuple(args, "OOOOO", &source, &maps[0], &maps[1], &maps[2], &target))
        return NULL;
    Py_buffer *in = get(&b, source, 3, sizeof(short), PyBUF_C_CONTIGUOUS);
    Py_buffer *out = in ? get(&b, target, 3, sizeof(short), PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) : NULL;
    if (!out || get_map(&b, maps[0], in->shape[0], &depth) || get_map(&b, maps[1], in->shape[1], &rows)
        || get_map(&more, maps[2], in->shape[2], &columns))
        goto failed;
    if (out->shape[0] != depth.n || out->shape[1] != rows.n || out->shape[2] != columns.n) {
        PyErr_SetString(PyExc_ValueError, "expected an output of the maps' shape");
        goto failed;
    }
    if (allocate(&s, in->shape[2], &columns))
        goto failed;
    Py_ssize_t row_bytes = in->shape[2] * sizeof(short), plane_bytes = in->shape[1] * row_bytes;
    const char *planes = in->buf;
    short *next = out->buf;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t z = 0; z < depth.n; z++) {
        const char *low = planes + depth.low[z] * plane_bytes, *high = planes + depth.high[z] * plane_bytes;
        Plane p = {low, high, depth.weight[z], 'h', in->shape[2], row_bytes};
        s.held[0] = s.held[1] = -1;
        for (Py_ssize_t r = 0; r < rows.n; r++, next += columns.n) {
            output_row(&p, &s, &rows, &columns, r, 1, 0, s.out);
            round_clip(s.out, -32768, 32767, columns.n, next);
        }
    }
    Py_END_ALLOW_THREADS
    deallocate(&s);
    release(&more);
    release(&b);
    Py_RETURN_NONE;
failed:
    release(&more);
    release(&b);
    return NULL;
}

/* Any affine */

/* The rows of the grid are made in bundles of TILE x TILE: the part of a scan that one needs stays in cache. */
enum { BLOCK = 128, TILE = 16 };

/* Along one axis of the scan, of a row of the grid: the position of its voxel x is start + step * x. */
typedef struct {
    double start, step, first, end, last; /* inside are positions in [first, end); they are cut to [0, last] */
} Line;

/* Return the first x in [from, n] whose position is at least `limit` (or, as positions fall, below it). */
static Py_ssize_t reaches(const Line *l, double limit, Py_ssize_t n)
{
    Py_ssize_t low = 0, high = n;
    while (low < high) {
        Py_ssize_t x = (low + high) / 2;
        double position = l->start + l->step * (double)x;
        if (l->step < 0 ? position < limit : position >= limit)
            high = x;
        else
            low = x + 1;
    }
    return low;
}

WIDE static void along(const Line *l, Py_ssize_t from, Py_ssize_t n, int *restrict low, double *restrict weight)
{
    double start = l->start, step = l->step, last = l->last;
    int most = (int)last - 1, first = (int)from;
    double ends[2] = {start + step * (double)first, start + step * (double)(first + (int)n - 1)};
    if (ends[0] >= 0 && ends[1] >= 0 && ends[0] < last && ends[1] < last) { /* nothing to cut, and less to do */
        for (int i = 0; i < (int)n; i++) {
            double p = start + step * (double)(first + i);
            low[i] = (int)p;
            weight[i] = p - (double)(int)p;
        }
        return;
    }
    for (int i = 0; i < (int)n; i++) {
        double p = start + step * (double)(first + i);
        p = p < 0 ? 0 : p;
        p = p > last ? last : p;
        int index = (int)p;
        index = index > most ? most : index;
        low[i] = index;
        weight[i] = p - (double)index;
    }
}

/* Of up to BLOCK voxels in a row: the eight neighbours lie at low and low + 1 along each axis. */
typedef struct {
    int low[3][BLOCK];
    double weight[3][BLOCK];
    double slope, intercept, floor, ceiling;
} Block;

#define MIX(a, b, w) ((a) + (w) * ((b) - (a)))
/* Two neighbours in a row, as they are read at once: the value of the first, and the second less the first. Of integers
   both are whole numbers below 2^17, which a double holds; of floats the difference is rounded once, as in numpy. */
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define SWAP(v) ((v) << 16 | (v) >> 16)
#else
#define SWAP(v) (v)
#endif
#define SHORT(v) ((int32_t)(SWAP(v) << 16) >> 16)
#define SHORT_STEP(v) (((int32_t)SWAP(v) >> 16) - SHORT(v))
#define USHORT(v) ((int32_t)(SWAP(v) & 0xffff))
#define USHORT_STEP(v) ((int32_t)(SWAP(v) >> 16) - USHORT(v))
#define FLOAT(v) ((v).first)
#define FLOAT_STEP(v) ((double)(v).second - (double)(v).first)
typedef struct { float first, second; } Floats;

#define TRILINEAR(name, T, Place, Pair, FIRST, STEP) \
    WIDE static void name(const T *volume, Py_ssize_t sz, Py_ssize_t sy, const Block *k, Py_ssize_t n, short *restrict out) \
    { \
        Pair v[4][BLOCK]; \
        Place place[BLOCK]; \
        for (Py_ssize_t i = 0; i < n; i++) \
            place[i] = k->low[0][i] * (Place)sz + k->low[1][i] * (Place)sy + k->low[2][i]; \
        for (Py_ssize_t i = 0; i < n; i++) { \
            const T *at = volume + place[i]; \
            memcpy(&v[0][i], at, sizeof(Pair)); \
            memcpy(&v[1][i], at + sy, sizeof(Pair)); \
            memcpy(&v[2][i], at + sz, sizeof(Pair)); \
            memcpy(&v[3][i], at + sz + sy, sizeof(Pair)); \
        } \
        for (Py_ssize_t i = 0; i < n; i++) { \
            double wz = k->weight[0][i], wy = k->weight[1][i], wx = k->weight[2][i], row[4]; \
            for (int j = 0; j < 4; j++) \
                row[j] = (double)FIRST(v[j][i]) + wx * (double)STEP(v[j][i]); \
            double low = MIX(row[0], row[1], wy), high = MIX(row[2], row[3], wy); \
            double hu = MIX(low, high, wz) * k->slope + k->intercept; \
            hu = (hu + 6755399441055744.0) - 6755399441055744.0; \
            hu = hu < k->floor ? k->floor : hu; \
            hu = hu > k->ceiling ? k->ceiling : hu; \
            out[i] = (short)(int)hu; \
        } \
    }
TRILINEAR(trilinear_short, short, int32_t, uint32_t, SHORT, SHORT_STEP)
TRILINEAR(trilinear_ushort, unsigned short, int32_t, uint32_t, USHORT, USHORT_STEP)
TRILINEAR(trilinear_float, float, int32_t, Floats, FLOAT, FLOAT_STEP)
/* The same of scans of more values than 32 bits count. */
TRILINEAR(large_short, short, int64_t, uint32_t, SHORT, SHORT_STEP)
TRILINEAR(large_ushort, unsigned short, int64_t, uint32_t, USHORT, USHORT_STEP)
TRILINEAR(large_float, float, int64_t, Floats, FLOAT, FLOAT_STEP)

static void affine_row(const Py_buffer *in, const Line *lines, Block *k, Py_ssize_t n, short *restrict out)
{
    Py_ssize_t from = 0, to = n, sy = in->strides[1] / in->itemsize, sz = in->strides[0] / in->itemsize;
    int large = (int64_t)sz * in->shape[0] + (int64_t)sy * in->shape[1] + in->shape[2] > INT32_MAX;
    for (int a = 0; a < 3; a++) {
        const Line *l = &lines[a];
        Py_ssize_t enters = reaches(l, l->step < 0 ? l->end : l->first, n);
        Py_ssize_t leaves = reaches(l, l->step < 0 ? l->first : l->end, n);
        from = enters > from ? enters : from;
        to = leaves < to ? leaves : to;
    }
    for (Py_ssize_t x = from; x < to; x += BLOCK) {
        Py_ssize_t m = to - x < BLOCK ? to - x : BLOCK;
        for (int a = 0; a < 3; a++)
            along(&lines[a], x, m, k->low[a], k->weight[a]);
        switch (in->format[0]) {
        case 'h': (large ? large_short : trilinear_short)(in->buf, sz, sy, k, m, out + x); break;
        case 'H': (large ? large_ushort : trilinear_ushort)(in->buf, sz, sy, k, m, out + x); break;
        default: (large ? large_float : trilinear_float)(in->buf, sz, sy, k, m, out + x);
        }
    }
}

static PyObject *affine(PyObject *self, PyObject *args)
{
    PyObject *source, *target;
    double m[3][4], rim;
    Block k;
    Buffers b = {.count = 0};
    if (!PyArg_ParseTuple(args, "O(dddddddddddd)dddddO", &source, &m[0][0], &m[0][1], &m[0][2], &m[0][3], &m[1][0],
                          &m[1][1], &m[1][2], &m[1][3], &m[2][0], &m[2][1], &m[2][2], &m[2][3], &rim, &k.slope,
                          &k.intercept, &k.floor, &k.ceiling, &target))
        return NULL;
    Py_buffer *in = get(&b, source, 3, 0, PyBUF_STRIDES);
    Py_buffer *out = in ? get(&b, target, 3, sizeof(short), PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) : NULL;
    if (!out)
        goto failed;
    int known = is_one_of("hHf", in);
    for (int a = 0; a < 3; a++)
        known = known && in->shape[a] >= 2 && in->shape[a] < (1 << 30) && in->strides[a] > 0
            && in->strides[a] % in->itemsize == 0;
    if (!known || in->strides[2] != in->itemsize) {
        PyErr_SetString(PyExc_ValueError,
                        "expected whole rows of int16, uint16 or float32, two voxels or more along each axis");
        goto failed;
    }
    Py_ssize_t nz = out->shape[0], ny = out->shape[1], nx = out->shape[2], down = (ny + TILE - 1) / TILE;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t tile = 0; tile < (nz + TILE - 1) / TILE * down; tile++)
        for (Py_ssize_t in_tile = 0; in_tile < TILE * TILE; in_tile++) {
            Py_ssize_t z = tile / down * TILE + in_tile / TILE, y = tile % down * TILE + in_tile % TILE;
            if (z >= nz || y >= ny)
                continue;
            Line lines[3];
            for (int a = 0; a < 3; a++) {
                double start = (m[a][3] + m[a][0] * (double)z) + m[a][1] * (double)y, size = (double)in->shape[a];
                lines[a] = (Line){start, m[a][2], -0.5 - rim, size - 0.5 - rim, size - 1};
            }
            affine_row(in, lines, &k, nx, (short *)out->buf + (z * ny + y) * nx);
        }
    Py_END_ALLOW_THREADS
    release(&b);
    Py_RETURN_NONE;
failed:
    release(&b);
    return NULL;
}

static PyMethodDef methods[] = {
    {"plane", plane, METH_VARARGS, "plane(plane, rows, columns, slope, intercept, out)"},
    {"between", between, METH_VARARGS, "between(low, high, weight, floor, ceiling, out)"},
    {"resize", resize, METH_VARARGS, "resize(array, depth, rows, columns, out)"},
    {"affine", affine, METH_VARARGS, "affine(array, matrix, rim, slope, intercept, floor, ceiling, out)"},
    {NULL, NULL, 0, NULL},
};

static int fill(PyObject *module)
{
    return PyModule_AddIntConstant(module, "VERSION", VERSION);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, fill}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_kernels", "See photon_data/interpolate.py.", 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__kernels(void)
{
    return PyModuleDef_Init(&definition);
}
