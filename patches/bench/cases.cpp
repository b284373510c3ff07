#include "cases.h"

#include <cstdio>

#include "base.h"

static const char * const SKVQ_2 = "skvq:k=2,v=2";
static const char * const SKVQ_3 = "skvq:k=3,v=3";
static const char * const SKVQ_4 = "skvq:k=4,v=4";
static const char * const KIVI_2 = "kivi:k=2.25";
static const char * const KIVI_3 = "kivi:k=3,v=3";
static const char * const KIVI_4 = "kivi:k=4,v=4";
static const char * const OTT_2  = "ott:k=2.25";
static const char * const OTT_3  = "ott:k=3,v=3";
static const char * const OTT_4  = "ott:k=4,v=4";
static const char * const QAQ    = "qaq:bits=2.25";

const std::vector<Case> QUICK = {
    { SKVQ_2,   4096, 1, 128, 4, 2 },
    { SKVQ_2,  16384, 1, 128, 4, 2 },
    { SKVQ_2,  32768, 1, 128, 4, 2 },
};

const std::vector<Case> FULL = {
    { SKVQ_2,   4096,   1, 128, 4, 2 },
    { SKVQ_2,  16384,   1, 128, 4, 2 },
    { SKVQ_2,  32768,   1, 128, 4, 2 },
    { SKVQ_2, 131072,   1, 128, 4, 2 },
    { SKVQ_3,  32768,   1, 128, 4, 2 },
    { SKVQ_4,  32768,   1, 128, 4, 2 },
    { KIVI_2,  32768,   1, 128, 4, 2 },
    { KIVI_3,  32768,   1, 128, 4, 2 },
    { KIVI_4,  32768,   1, 128, 4, 2 },
    { OTT_2,   32768,   1, 128, 4, 2 },
    { OTT_3,   32768,   1, 128, 4, 2 },
    { OTT_4,   32768,   1, 128, 4, 2 },
    { QAQ,     32768,   1, 128, 4, 2 },
    { SKVQ_2,  32768,   1, 128, 4, 1 },
    { SKVQ_2,   8192,   1,  64, 4, 2 },
    { SKVQ_2,   8192,   1,  96, 4, 2 },
    { SKVQ_2,   8192,   1, 128, 4, 2 },
    { SKVQ_2,   8192,   1, 256, 4, 2 },
    { SKVQ_2,   8192,   1, 128, 1, 2 },
    { SKVQ_2,   8192,   1, 128, 8, 2 },
    { SKVQ_2,  32768, 512, 128, 4, 2 },
};

const std::vector<Bar> BARS = {
    { "ratio_f16",  "skvq:k=2,v=2/16384/1/128/4/2",   "", true,  5.0 },
    { "ratio_f16",  "skvq:k=2,v=2/4096/1/128/4/2",    "", true,  8.0 },
    { "ratio_q4_0", "skvq:k=2,v=2/4096/1/128/4/2",    "", true, 30.0 },
    { "ratio_f16",  "skvq:k=2,v=2/32768/1/128/4/2",   "", true, 25.0 },
    { "ratio_q4_0", "skvq:k=2,v=2/32768/1/128/4/2",   "", true, 45.0 },
    { "ratio_f16",  "skvq:k=2,v=2/131072/1/128/4/2",  "", true, 20.0 },
    { "ratio_f16",  "skvq:k=3,v=3/32768/1/128/4/2",   "", true, 15.0 },
    { "ratio_q4_0", "skvq:k=3,v=3/32768/1/128/4/2",   "", true, 28.0 },
    { "ratio_f16",  "skvq:k=4,v=4/32768/1/128/4/2",   "", true, 15.0 },
    { "ratio_q4_0", "skvq:k=4,v=4/32768/1/128/4/2",   "", true, 28.0 },
    { "ratio_f16",  "kivi:k=2.25/32768/1/128/4/2",    "", true, 15.0 },
    { "ratio_q4_0", "kivi:k=2.25/32768/1/128/4/2",    "", true, 28.0 },
    { "ratio_f16",  "kivi:k=3,v=3/32768/1/128/4/2",   "", true, 15.0 },
    { "ratio_q4_0", "kivi:k=3,v=3/32768/1/128/4/2",   "", true, 28.0 },
    { "ratio_f16",  "kivi:k=4,v=4/32768/1/128/4/2",   "", true, 15.0 },
    { "ratio_q4_0", "kivi:k=4,v=4/32768/1/128/4/2",   "", true, 28.0 },
    { "ratio_f16",  "ott:k=2.25/32768/1/128/4/2",     "", true, 15.0 },
    { "ratio_q4_0", "ott:k=2.25/32768/1/128/4/2",     "", true, 28.0 },
    { "ratio_f16",  "ott:k=3,v=3/32768/1/128/4/2",    "", true, 15.0 },
    { "ratio_q4_0", "ott:k=3,v=3/32768/1/128/4/2",    "", true, 28.0 },
    { "ratio_f16",  "ott:k=4,v=4/32768/1/128/4/2",    "", true, 15.0 },
    { "ratio_q4_0", "ott:k=4,v=4/32768/1/128/4/2",    "", true, 28.0 },
    { "ratio_f16",  "qaq:bits=2.25/32768/1/128/4/2",  "", true,  8.0 },
    { "ratio_q4_0", "qaq:bits=2.25/32768/1/128/4/2",  "", true, 15.0 },
    { "ratio_f16",  "skvq:k=2,v=2/32768/512/128/4/2", "", true,  4.0 },
    { "ratio_q4_0", "skvq:k=2,v=2/32768/512/128/4/2", "", true, 30.0 },
    { "us_kvq", "skvq:k=2,v=2/131072/1/128/4/2", "skvq:k=2,v=2/32768/1/128/4/2", false, 4.5 },
    { "us_kvq", "skvq:k=2,v=2/32768/1/128/4/1",  "skvq:k=2,v=2/32768/1/128/4/2", true,  1.8 },
};

Case parse_case(const std::string & text) {
    Case c;
    char recipe[256];
    const int n_read =
        sscanf(text.c_str(), "%255[^/]/%d/%d/%d/%d/%d", recipe, &c.n_kv, &c.n_q, &c.head_dim, &c.gqa, &c.threads);
    if (n_read != 6 || c.n_q < 1 || c.n_q > UBATCH || c.n_kv <= c.n_q || c.gqa < 1 || c.threads < 1) {
        die("--case " + text + ": use RECIPE/CELLS/QUERIES/DIM/GQA/THREADS, at most 512 queries and fewer than cells");
    }
    c.recipe = recipe;
    return c;
}
