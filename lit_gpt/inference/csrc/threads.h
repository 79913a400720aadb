// Threads: those of the OpenMP that PyTorch has loaded, so that there is one pool of them.
//
// This library is linked to no OpenMP: native.py hands over the functions. Without them there is one thread.

#pragma once

namespace {

struct Range {
    long from, to;
};

// The threads that run a function at once, as one of them has it: its number, and how many they are.
struct Team {
    long thread, n_threads;

    // Returns when all of them have come here.
    INLINE void wait() const {
        if (n_threads > 1) openmp.barrier();
    }

    // This thread's share of 0 … n - 1. All shares together are the whole; the calling thread, which need not wake up, has
    // the largest.
    INLINE Range share(long n) const { return {start(n, thread), start(n, thread + 1)}; }
    INLINE long start(long n, long of) const { return (n * of + n_threads - 1) / n_threads; }

    // Calls `function` for each of 0 … n - 1, of which each thread takes its share; returns when all have been done.
    template <typename Function>
    INLINE void each(long n, const Function &function) const {
        const Range own = share(n);
        for (long i = own.from; i < own.to; i++) function(i);
        wait();
    }

    // The same with every n_threads-th of them for a thread: where one after the other is more work.
    template <typename Function>
    INLINE void each_in_turn(long n, const Function &function) const {
        for (long i = thread; i < n; i += n_threads) function(i);
        wait();
    }
};

template <typename Function>
void run_in_team(void *function) {
    (*(const Function *)function)(Team{openmp.thread_num(), openmp.num_threads()});
}

// Calls `function` with its Team on that many threads at once, or fewer where OpenMP gives fewer; returns when all have.
template <typename Function>
void run_on_threads(int threads, const Function &function) {
    if (threads > 1 && openmp.parallel)
        openmp.parallel(run_in_team<Function>, (void *)&function, threads, 0);
    else
        function(Team{0, 1});
}

}  // namespace
