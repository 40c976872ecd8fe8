//! Whatever the bytes are, opening them neither panics nor runs out of memory.

use candle_core::quantized::GgmlDType;
use infold::weights::{Checkpoint, WeightsError};
use proptest::prelude::*;
use serde_json::json;

use super::{CONFIG, Directory, gguf::Gguf, raw_safetensors, shard};

/// Opens a file of these bytes and, if that works, touches everything in it.
fn open_and_read(name: &str, bytes: &[u8]) -> Result<(), WeightsError> {
    let directory = Directory::new(&[CONFIG, (name, bytes)]);
    let checkpoint = Checkpoint::open(directory.path())?;
    let mut read_bytes = 0;
    for name in checkpoint.names() {
        if let Ok(tensor) = checkpoint.tensor(name) {
            read_bytes += tensor.data.len();
        }
    }
    assert!(read_bytes <= bytes.len());
    checkpoint.num_parameters();
    checkpoint.tokenizer();
    Ok(())
}

/// Overwrites bytes with noise, lengths with extremes, or cuts the file.
#[derive(Debug, Clone)]
enum Damage {
    Byte(prop::sample::Index, u8),
    Length(prop::sample::Index, u64),
    Cut(prop::sample::Index),
}

impl Damage {
    /// Damages the first `reach` bytes, where the header is.
    fn apply(&self, file: &mut Vec<u8>, reach: usize) {
        let reach = reach.min(file.len());
        if reach < 8 {
            return;
        }
        match self {
            Self::Byte(at, value) => file[at.index(reach)] = *value,
            Self::Length(at, value) => {
                let at = at.index(reach - 7);
                file[at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
            Self::Cut(at) => file.truncate(at.index(file.len())),
        }
    }
}

fn damage() -> impl Strategy<Value = Damage> {
    let extremes = prop::sample::select(vec![
        0,
        1,
        255,
        1 << 31,
        1 << 40,
        1 << 62,
        u64::MAX >> 1,
        u64::MAX,
    ]);
    let index = any::<prop::sample::Index>;
    prop_oneof![
        4 => (index(), any::<u8>()).prop_map(|(at, value)| Damage::Byte(at, value)),
        4 => (index(), extremes).prop_map(|(at, value)| Damage::Length(at, value)),
        1 => index().prop_map(Damage::Cut),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn noise_is_refused_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(open_and_read("model.safetensors", &bytes).is_err());
        prop_assert!(open_and_read("model.gguf", &bytes).is_err());
        let mut gguf = b"GGUF\x03\0\0\0".to_vec();
        gguf.extend_from_slice(&bytes);
        prop_assert!(open_and_read("model.gguf", &gguf).is_err());
    }

    #[test]
    fn damaged_safetensors_never_panic(damages in prop::collection::vec(damage(), 1..4)) {
        let mut file = shard(&[("w", &[3, 4]), ("b", &[5])]);
        let header = file.len() - 34;
        damages.iter().for_each(|damage| damage.apply(&mut file, header));
        drop(open_and_read("model.safetensors", &file));
    }

    #[test]
    fn damaged_gguf_never_panics(damages in prop::collection::vec(damage(), 1..4)) {
        let mut file = Gguf::new("llama", GgmlDType::Q8_0).bytes();
        let header = 1500;
        damages.iter().for_each(|damage| damage.apply(&mut file, header));
        drop(open_and_read("model.gguf", &file));
    }

    #[test]
    fn arbitrary_safetensors_headers_never_panic(
        dtype in prop::sample::select(vec!["F32", "BF16", "F4", "X", ""]),
        shape in prop::collection::vec(prop_oneof![0..5_u64, any::<u64>()], 0..5),
        begin in prop_oneof![0..9_u64, any::<u64>()],
        end in prop_oneof![0..9_u64, any::<u64>()],
        data_bytes in 0..9_usize,
    ) {
        let header = json!({"w": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}});
        drop(open_and_read("model.safetensors", &raw_safetensors(&header.to_string(), data_bytes)));
    }
}
