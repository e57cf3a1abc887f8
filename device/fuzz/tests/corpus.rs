// SPDX-License-Identifier: MIT OR Apache-2.0
//! Each fuzz target over its corpus, and over random bytes of this run: what cargo-fuzz does for
//! longer, without cargo-fuzz.

use farfault_fuzz::TARGETS;
use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{Config, TestRunner},
};
use std::{fs, path::Path};

#[test]
fn corpus_of_each_target_has_no_finding() {
    for (name, run) in TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("corpus")
            .join(name);
        let files = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let mut count = 0;
        for file in files {
            let path = file.unwrap().path();
            println!("{}", path.display());
            run(&fs::read(&path).unwrap());
            count += 1;
        }
        assert!(count > 0, "{} is empty", folder.display());
    }
}

#[test]
fn random_bytes_have_no_finding() {
    for (name, run) in TARGETS {
        println!("{name}");
        let mut runner = TestRunner::new(Config {
            cases: 300,
            failure_persistence: None,
            ..Config::default()
        });
        let result = runner.run(&vec(any::<u8>(), 0..1500), |bytes| {
            run(&bytes);
            Ok(())
        });
        result.unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}
