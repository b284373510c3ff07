// What this machine can do with a number of threads: the two terms of the floor.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "buffer.h"
#include "workers.h"

std::string cpu_model();

class Machine {
public:
    Machine();
    Workers & workers(int threads);
    // Pushes everything else out of the caches of all cores in use.
    void flush(int threads);
    // Bytes a second that the threads together read from memory.
    double bandwidth(int threads);
    // int8 multiply-adds a second of the threads together; 0 if not known for this instruction set.
    double int8_peak(int threads);

private:
    double best(double & known, const std::function<void()> & work, double amount);

    Buffer flush_;
    std::map<int, std::unique_ptr<Workers>> workers_;
    std::map<int, double> bandwidth_, peak_;
    std::atomic<uint64_t> sink_{ 0 };
};
