// What the Hopper kernels share: barriers, the tensor copy engine, wgmma, dependent launch.
// PTX of sm_90a; NVRTC compiles it without any header of CUDA's.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// A CUtensorMap, passed by value.
struct __align__(64) TensorMap {
    u8 bytes[128];
};

#define DEVICE __device__ __forceinline__

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// -- barriers in shared memory, by address ----------------------------------------------------------

DEVICE void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// After the inits, before anybody (of the cluster or the copy engine) uses them.
DEVICE void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Until the phase of that parity is over: 0 for the first. A fresh barrier counts as past phase 1.
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nWAIT:\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Threads of a block that meet at `id` (1 to 15), `count` of them.
DEVICE void meet(int id, int count) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}

DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
// Where nobody needs what was written before.
DEVICE void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// -- the tensor copy engine ---------------------------------------------------------------------------

DEVICE void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Columns from c, rows from r of a 2D tensor to shared memory; `barrier` counts the bytes.
DEVICE void load_box(u32 to, const TensorMap* map, u32 barrier, int c, int r) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
        "l"(map), "r"(barrier), "r"(c), "r"(r)
        : "memory");
}

// The same of what nobody reads again soon: it leaves the L2 cache before what others left there.
DEVICE void load_box_once(u32 to, const TensorMap* map, u32 barrier, int c, int r) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
        "l"(map), "r"(barrier), "r"(c), "r"(r), "l"(0x12F0000000000000ull)
        : "memory");
}

// The same for the blocks of the cluster that `mask` names, to the same place of each; a barrier of
// each at the same place counts.
DEVICE void load_box_for_all(u32 to, const TensorMap* map, u32 barrier, int c, int r, int mask) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster.L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(to),
        "l"(map), "r"(barrier), "r"(c), "r"(r), "h"((u16)mask), "l"(0x12F0000000000000ull)
        : "memory");
}

// What ordinary stores wrote to shared memory becomes visible to wgmma and the copy engine.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// -- wgmma ------------------------------------------------------------------------------------------

// Descriptor of a tile of rows of 128 bytes, swizzled as the copy engine does (128 B), aligned to
// 1024 bytes: 1024 bytes between groups of 8 rows. Of 64 bits the lower 32; the upper ones are the
// same everywhere. Along the rows' bytes (16 bf16 are 32 bytes) and from row to row add bytes / 16.
// `between`: for an operand whose rows are K, bytes between its blocks of 64 columns. The upper byte
// of an address, the block's number in its cluster, is no part of it.
DEVICE u32 describe(u32 address, u32 between = 16) {
    return (address & 0x3FFFF) >> 4 | between / 16 << 16;
}
DEVICE u64 with_upper(u32 lower) { return (u64)(1 << 30 | 64) << 32 | lower; }

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

template <int N>
DEVICE void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
DEVICE void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// -- dependent launch ----------------------------------------------------------------------------------

// The next kernel's blocks may start where there is room; until they wait they read weights alone.
DEVICE void launch_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// The kernel before is over and what it wrote is visible.
DEVICE void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// -- other blocks' shared memory -------------------------------------------------------------------

// The same place of another block of the cluster.
DEVICE u32 address_at(u32 address, u32 block) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
    return there;
}
// Without a scope: .release.cluster waits for all memory of the GPU (MEMBAR.ALL.GPU).
DEVICE void barrier_arrive_at(u32 barrier_there) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier_there) : "memory");
}
// 16 bytes there, which a barrier there counts.
DEVICE void send(u32 there, u32 barrier_there, float a, float b, float c, float d) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];" ::
            "r"(there), "r"(barrier_there), "f"(a), "f"(b), "f"(c), "f"(d)
        : "memory");
}
DEVICE float4 load_shared(u32 address) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}

// -- numbers --------------------------------------------------------------------------------------------

DEVICE u32 pack_bf16(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
DEVICE float low_bf16(u32 both) { return __uint_as_float(both << 16); }
DEVICE float high_bf16(u32 both) { return __uint_as_float(both & 0xFFFF0000u); }
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Off by 2^-11 at most.
DEVICE float tanh_fast(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Four lanes hold columns 2 t, 2 t + 1 of each of four blocks of 8 columns, as wgmma leaves them;
// afterwards lane t has all 8 columns of block t. Called by whole warps.
DEVICE uint4 gather_block(u32 b0, u32 b1, u32 b2, u32 b3) {
    const int t = threadIdx.x & 3;
    // first with the lane that differs in bit 0: keep the blocks whose bit 0 is ours
    u32 keep0 = t & 1 ? b1 : b0, give0 = t & 1 ? b0 : b1;
    u32 keep1 = t & 1 ? b3 : b2, give1 = t & 1 ? b2 : b3;
    u32 got0 = __shfl_xor_sync(0xFFFFFFFFu, give0, 1);
    u32 got1 = __shfl_xor_sync(0xFFFFFFFFu, give1, 1);
    // of block (t & 1) and of block 2 + (t & 1): columns of lanes t and t ^ 1, in order
    u32 a0 = t & 1 ? got0 : keep0, a1 = t & 1 ? keep0 : got0;
    u32 c0 = t & 1 ? got1 : keep1, c1 = t & 1 ? keep1 : got1;
    // then with the lane that differs in bit 1
    u32 mine0 = t & 2 ? c0 : a0, mine1 = t & 2 ? c1 : a1;
    u32 other0 = t & 2 ? a0 : c0, other1 = t & 2 ? a1 : c1;
    u32 from0 = __shfl_xor_sync(0xFFFFFFFFu, other0, 2);
    u32 from1 = __shfl_xor_sync(0xFFFFFFFFu, other1, 2);
    return t & 2 ? make_uint4(from0, from1, mine0, mine1) : make_uint4(mine0, mine1, from0, from1);
}

// The other way round: lane t has block t, afterwards columns 2 t, 2 t + 1 of each block.
DEVICE void deal_block(uint4 block, u32* to) {
    const uint4 all = gather_block(block.x, block.y, block.z, block.w);
    to[0] = all.x, to[1] = all.y, to[2] = all.z, to[3] = all.w;
}

// -- what the attention needs besides ---------------------------------------------------------------

// What a unit works on, in the plan of a step: 32 bytes, then its request's pages.
struct __align__(16) Unit {
    int first, end, length, tile, kv_head;
    int unused[3];
};
// Ints of a unit in the plan.
DEVICE int plan_stride(int num_columns) { return 8 + (num_columns + 3) / 4 * 4; }

// After wgmma_wait: nobody reads the accumulators before it.
template <int N>
DEVICE void settle(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int M, int N>
DEVICE void settle(float (&d)[M][N]) {
#pragma unroll
    for (int i = 0; i < M; i++) settle(d[i]);
}

// Loads from another block's shared memory.
DEVICE float2 load2_at(u32 address) {
    float2 x;
    asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
                 : "=f"(x.x), "=f"(x.y)
                 : "r"(address)
                 : "memory");
    return x;
}
DEVICE float4 load4_at(u32 address) {
    float4 x;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}
DEVICE float load1(u32 address) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
    return x;
}
DEVICE float2 load2(u32 address) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(x.x), "=f"(x.y)
                 : "r"(address)
                 : "memory");
    return x;
}
DEVICE void store1(u32 address, float x) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}
DEVICE void store2(u32 address, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}
DEVICE void store4(u32 address, uint4 x) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y),
                 "r"(x.z), "r"(x.w)
                 : "memory");
}
// Four 8 x 8 matrices of bf16, or two, as mma takes them: lane l names row l % 8 of matrix l / 8.
DEVICE void load_matrices(u32 address, u32 (&to)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}
DEVICE void load_matrices(u32 address, u32 (&to)[2]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(address)
                 : "memory");
}
// d [16, 8] += a [16, 16] @ b [16, 8], by one warp; rows and columns of d as wgmma has them.
DEVICE void multiply_small(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
        " {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
