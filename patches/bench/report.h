// What people and scripts read: the table, the CSV, bars met and missed.
#pragma once

#include <vector>

#include "measure.h"

void print_head();
void print_row(const Result & r);
void write_csv(const char * path, const std::vector<Result> & results);

// Number of bars that are missed; bars of cases that were not measured do not count.
int check(const std::vector<Result> & results);
