//! Holds the source to the map in `src/lib.rs`: which folder may use which, and where certain
//! words may stand.

use std::fs;
use std::path::{Path, PathBuf};

/// Each folder of `src/` and the folders that its files may import.
const ALLOWED: &[(&str, &[&str])] = &[
    ("vocabulary", &[]),
    ("text", &["vocabulary"]),
    ("weights", &["vocabulary"]),
    ("kernels", &[]),
    ("distributed", &[]),
    ("layers", &["weights", "kernels", "distributed"]),
    ("models", &["kernels", "layers"]),
    (
        "engine",
        &["weights", "kernels", "distributed", "layers", "models"],
    ),
    (
        "train",
        &[
            "text",
            "weights",
            "kernels",
            "distributed",
            "layers",
            "models",
        ],
    ),
    ("serve", &["text", "weights", "engine"]),
    ("merge", &["text", "weights"]),
    ("bench", &["engine", "weights"]),
    ("chat", &[]),
];

/// `(word, folders that may hold it)`: the rest of `src/` may not.
const CONFINED: &[(&str, &[&str])] = &[
    ("axum::", &["serve"]),
    ("hyper::", &["serve"]),
    ("tokenizers::", &["text"]),
    ("minijinja", &["text"]),
    ("unsafe ", &["kernels/cpu", "kernels/cuda", "weights"]),
];

fn source_files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(source_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

fn sources() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let name = |path: &Path| {
        path.strip_prefix(&root)
            .unwrap()
            .to_string_lossy()
            .into_owned()
    };
    source_files(&root)
        .iter()
        .map(|path| (name(path), fs::read_to_string(path).unwrap()))
        .collect()
}

/// The code of a file: comment lines left out.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .filter(|line| !line.trim_start().starts_with("//"))
}

#[test]
fn folders_import_only_what_the_table_allows() {
    let folders: Vec<&str> = ALLOWED.iter().map(|(folder, _)| *folder).collect();
    for (file, text) in sources() {
        let Some((folder, _)) = file.split_once('/') else {
            continue;
        };
        let row = ALLOWED.iter().find(|(name, _)| *name == folder);
        let (_, allowed) =
            row.unwrap_or_else(|| panic!("{file}: folder {folder} is not in the table"));
        for line in code(&text) {
            for other in &folders {
                let imports = line.contains(&format!("crate::{other}"));
                assert!(
                    !imports || *other == folder || allowed.contains(other),
                    "{file} imports {other}: {line}"
                );
            }
        }
    }
}

#[test]
fn confined_words_stay_in_their_folders() {
    for (file, text) in sources() {
        for (word, folders) in CONFINED {
            let may = folders.iter().any(|folder| file.starts_with(folder));
            for line in code(&text) {
                assert!(may || !line.contains(word), "{file} holds `{word}`: {line}");
            }
        }
    }
}

#[test]
fn scheduling_is_pure() {
    for (file, text) in sources() {
        if ![
            "engine/scheduler",
            "engine/block_manager",
            "engine/sequence",
        ]
        .iter()
        .any(|pure| file.starts_with(pure))
        {
            continue;
        }
        for line in code(&text) {
            for word in ["candle", "std::thread", "std::time", "tokio", "crate::"] {
                assert!(!line.contains(word), "{file} holds `{word}`: {line}");
            }
        }
    }
}

#[test]
fn every_file_says_what_it_is_for() {
    for (file, text) in sources() {
        assert!(
            text.starts_with("//!"),
            "{file} has no module documentation"
        );
    }
}
