// How a direction walks over the image, and who may write where; common.cuh comes before it.

#define FIRST 1  // no other direction has written there yet
#define LAST 2   // all other directions have
#define LATE 4   // what another wrote there may not be visible before this tile's merge
#define BEYOND 8 // the end of the image

// A lane follows one of two tiles' 32 steps from pair to pair, mostly without divisions.
struct Walk {
    int l, slow, fast;  // the step, and its line and place in it: rows, or columns
};

__device__ __forceinline__ Walk walk_from(int k, int l, int height, int width) {
    const int line = (k & 1) ? height : width;
    return {l, l / line, l % line};
}

__device__ __forceinline__ void advance(Walk& walk, int k, int height, int width) {
    const int line = (k & 1) ? height : width;
    walk.l += 2 * TILE;
    if (line >= 2 * TILE) {
        walk.fast += 2 * TILE;
        if (walk.fast >= line) walk.fast -= line, ++walk.slow;
    } else {
        walk.slow = walk.l / line;
        walk.fast = walk.l - walk.slow * line;
    }
}

// When direction `k` writes its step `l`: by tile, and within a tile rows before columns.
__device__ __forceinline__ int turn(int k, int l) {
    return l / TILE * K_DIRECTIONS + ((k & 1) << 1 | k >> 1);
}

// Where a step lies, and how its write stands to those of the other directions.
struct Entry {
    unsigned place;  // 0 beyond the end, so that it may be read from
    int flags;
};

__device__ __forceinline__ Entry entry(const Walk& walk, int k, int height, int width) {
    const int L = height * width;
    if (walk.l >= L) return {0u, BEYOND};
    int at = (k & 1) ? walk.fast * width + walk.slow : walk.l;
    int by_columns = (k & 1) ? walk.l : walk.fast * height + walk.slow;
    if (k >= 2) at = L - 1 - at, by_columns = L - 1 - by_columns;
    const int mine = turn(k, walk.l);
    const int turns[K_DIRECTIONS] = {turn(0, at), turn(1, by_columns), turn(2, L - 1 - at),
                                     turn(3, L - 1 - by_columns)};
    int first = 0x7fffffff, last = 0, before = -1;
#pragma unroll
    for (int other = 0; other < K_DIRECTIONS; ++other) {
        first = min(first, turns[other]);
        last = max(last, turns[other]);
        before = max(before, turns[other] < mine ? turns[other] : -1);
    }
    const bool late = before >= 0 && before / K_DIRECTIONS + (k & 1) >= walk.l / TILE;
    const int ends = (first == mine ? FIRST : 0) | (last == mine ? LAST : 0);
    return {(unsigned)at, ends | (late ? LATE : 0)};
}
