// SPDX-License-Identifier: MIT OR Apache-2.0
//! The first program: ten lines that let the GPU work on a `Vec`.

use farfault::Gpu;

fn main() -> farfault::Result<()> {
    let gpu = Gpu::open_first()?;
    let mut data = vec![1u64; 1 << 20];
    gpu.add(&mut data, 41)?; // the GPU faults, and the pages move to VRAM
    println!("{} pages moved to VRAM", gpu.stats()?.pages_to_vram);
    println!("the GPU's sum is {}", gpu.sum(&data)?);
    println!("the last word is {}", data[data.len() - 1]); // the CPU faults: its page comes home
    Ok(())
}
