/* One epoch of the textbook network by plain SGD, in C on one core: what the benchmark measures
 * `sgd_jax.make_epoch` against.
 *
 * Sigmoid layers, quadratic cost, float32, any sizes, any m. Pixels are bytes, as in the data set, and
 * a mini-batch is gathered and scaled when its turn comes. The matrix products are tiles of registers:
 * `vec` is GCC's and Clang's vector type, 16 floats, which compile to AVX-512 or to whatever the machine
 * has. Weights are kept transposed, (n_in, n_out) with rows filled up to whole vectors, so that the
 * thirty neurons of a hidden layer lie side by side.
 *
 *   cc -O3 -march=native -ffast-math -fPIC -c epoch.c
 *   cc -shared epoch.o -o epoch.so -lm
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define MAX_LAYERS 16
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static int padded(int count) { return (count + LANES - 1) / LANES * LANES; }

static float *zeros(size_t count) {
  size_t bytes = (count * sizeof(float) + 63) / 64 * 64;
  float *array = aligned_alloc(64, bytes ? bytes : 64);
  if (array) memset(array, 0, bytes);
  return array;
}

/* C (rows, cols) += sign · Σ_t A(·, t) B(t, ·), a tile of ROWS × 16·VECS held in registers.
 * A(i, t) is a[i * row_step + t * term_step]. */
#define DEFINE_TILE(ROWS, VECS)                                                                    \
  static inline __attribute__((always_inline)) void tile_##ROWS##_##VECS(                         \
      int terms, const float *restrict a, int row_step, int term_step, const float *restrict b,    \
      int b_step, float *restrict c, int c_step, float sign) {                                     \
    vec sums[ROWS][VECS];                                                                          \
    for (int i = 0; i < ROWS; i++)                                                                 \
      for (int v = 0; v < VECS; v++) sums[i][v] = (vec){0};                                        \
    for (int t = 0; t < terms; t++) {                                                              \
      vec row[VECS];                                                                               \
      for (int v = 0; v < VECS; v++) row[v] = *(const vec *)(b + (size_t)t * b_step + LANES * v);  \
      for (int i = 0; i < ROWS; i++) {                                                             \
        float factor = a[(size_t)i * row_step + (size_t)t * term_step];                            \
        for (int v = 0; v < VECS; v++) sums[i][v] += factor * row[v];                              \
      }                                                                                            \
    }                                                                                              \
    for (int i = 0; i < ROWS; i++)                                                                 \
      for (int v = 0; v < VECS; v++)                                                               \
        *(vec *)(c + (size_t)i * c_step + LANES * v) += sign * sums[i][v];                         \
  }
DEFINE_TILE(10, 2)
DEFINE_TILE(4, 2)
DEFINE_TILE(1, 2)
DEFINE_TILE(14, 1)
DEFINE_TILE(4, 1)
DEFINE_TILE(1, 1)

#define ROWS_OF_TILES(ROWS, VECS)                                                                  \
  for (; i + ROWS <= rows; i += ROWS)                                                              \
  tile_##ROWS##_##VECS(count, a + (size_t)i * row_step + (size_t)t * term_step, row_step,          \
                       term_step, b + (size_t)t * b_step + j, b_step,                              \
                       c + (size_t)i * c_step + j, c_step, sign)

/* C (rows, cols) += sign · A B; cols is a multiple of 16; terms are taken a few hundred at a time, so
 * that a strip of B stays in the first cache. */
static void multiply(int rows, int cols, int terms, const float *a, int row_step, int term_step,
                     const float *b, int b_step, float *c, int c_step, float sign) {
  const int block = 784;
  for (int t = 0; t < terms; t += block) {
    int count = terms - t < block ? terms - t : block, j = 0;
    for (; j + 2 * LANES <= cols; j += 2 * LANES) {
      int i = 0;
      ROWS_OF_TILES(10, 2);
      ROWS_OF_TILES(4, 2);
      ROWS_OF_TILES(1, 2);
    }
    if (j < cols) {
      int i = 0;
      ROWS_OF_TILES(14, 1);
      ROWS_OF_TILES(4, 1);
      ROWS_OF_TILES(1, 1);
    }
  }
}

static float sigmoid(float z) { return 1 / (1 + expf(fminf(-z, 80))); }

/* Walks the mini-batches: row s of batches (steps, m) names the examples of step s.
 *
 * sizes has layers + 1 entries. weights[l] is (sizes[l + 1], sizes[l]) and biases[l] (sizes[l + 1]),
 * both replaced by what they are after the epoch. Returns 0, or 1 where memory or layers run out. */
int epoch(int layers, const int *sizes, float **weights, float **biases, const uint8_t *pixels,
          const int32_t *labels, const int32_t *batches, int steps, int m, float rate) {
  if (layers < 1 || layers > MAX_LAYERS) return 1;
  float *wide[MAX_LAYERS], *bias[MAX_LAYERS], *act[MAX_LAYERS + 1], *delta[MAX_LAYERS + 1], *flipped;
  size_t largest = 0;
  int failed = 0;
  for (int l = 0; l <= layers; l++) {
    int width = padded(sizes[l]);
    failed |= !(act[l] = zeros((size_t)m * width)) | !(delta[l] = zeros((size_t)m * width));
    if (l == layers) break;
    int rows = sizes[l], cols = sizes[l + 1], step = padded(cols);
    failed |= !(wide[l] = zeros((size_t)rows * step)) | !(bias[l] = zeros(step));
    if (failed) continue;
    for (int j = 0; j < cols; j++) {
      bias[l][j] = biases[l][j];
      for (int k = 0; k < rows; k++) wide[l][(size_t)k * step + j] = weights[l][(size_t)j * rows + k];
    }
    size_t size = l ? (size_t)cols * width : 0;
    if (size > largest) largest = size;
  }
  failed |= !(flipped = zeros(largest));
  for (int s = 0; !failed && s < steps; s++) {
    const int32_t *batch = batches + (size_t)s * m;
    int first = padded(sizes[0]);
    for (int i = 0; i < m; i++) {
      const uint8_t *image = pixels + (size_t)batch[i] * sizes[0];
      for (int k = 0; k < sizes[0]; k++) act[0][(size_t)i * first + k] = image[k] * (1 / 255.0f);
    }
    for (int l = 0; l < layers; l++) {
      int in = padded(sizes[l]), out = padded(sizes[l + 1]);
      for (int i = 0; i < m; i++) memcpy(act[l + 1] + (size_t)i * out, bias[l], out * sizeof(float));
      multiply(m, out, sizes[l], act[l], in, 1, wide[l], out, act[l + 1], out, 1);
      for (size_t k = 0; k < (size_t)m * out; k++) act[l + 1][k] = sigmoid(act[l + 1][k]);
    }
    int last = padded(sizes[layers]);
    for (int i = 0; i < m; i++)
      for (int j = 0; j < sizes[layers]; j++) {
        float a = act[layers][(size_t)i * last + j];
        delta[layers][(size_t)i * last + j] = (a - (j == labels[batch[i]])) * a * (1 - a);
      }
    for (int l = layers - 1; l >= 0; l--) {
      int in = padded(sizes[l]), out = padded(sizes[l + 1]);
      if (l) { /* at the old weights */
        for (int j = 0; j < sizes[l + 1]; j++)
          for (int k = 0; k < sizes[l]; k++) flipped[(size_t)j * in + k] = wide[l][(size_t)k * out + j];
        memset(delta[l], 0, (size_t)m * in * sizeof(float));
        multiply(m, in, sizes[l + 1], delta[l + 1], out, 1, flipped, in, delta[l], in, 1);
        for (size_t k = 0; k < (size_t)m * in; k++) delta[l][k] *= act[l][k] * (1 - act[l][k]);
      }
      multiply(sizes[l], out, m, act[l], 1, in, delta[l + 1], out, wide[l], out, -rate / m);
      for (int i = 0; i < m; i++)
        for (int j = 0; j < sizes[l + 1]; j++) bias[l][j] -= rate / m * delta[l + 1][(size_t)i * out + j];
    }
  }
  for (int l = 0; l <= layers; l++) {
    if (l < layers) {
      int rows = sizes[l], cols = sizes[l + 1], step = padded(cols);
      for (int j = 0; !failed && j < cols; j++) {
        biases[l][j] = bias[l][j];
        for (int k = 0; k < rows; k++) weights[l][(size_t)j * rows + k] = wide[l][(size_t)k * step + j];
      }
      free(wide[l]);
      free(bias[l]);
    }
    free(act[l]);
    free(delta[l]);
  }
  free(flipped);
  return failed;
}
