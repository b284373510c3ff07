//! Prints the instruction sets for which kvq has kernels and which this processor has, one a line: `c_tests/run.sh` asks.

use kvq::simd::isa::{Isa, IsaToken};

fn main() {
    for isa in Isa::ALL.into_iter().filter(|isa| IsaToken::new(*isa).is_some()) {
        println!("{}", isa.name());
    }
}
