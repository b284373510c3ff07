// What every part uses: errors, time, and what is made of many times.
#pragma once

#include <string>
#include <vector>

#include "kvq.h"

// Stands for a time or a ratio that was not measured.
constexpr double NEVER = 0.0;

[[noreturn]] void die(const std::string & text);
void ok(kvq_status status);

// Seconds, of elapsed time or, once asked for, of the time that this process was on a core.
double now();
void use_cpu_time();

double median(std::vector<double> v);
double minimum(const std::vector<double> & v);
