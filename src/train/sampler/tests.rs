//! The order against torch 2.6 (`torch.randperm`) and accelerate 1.1.1 (`BatchSamplerShard`).

use serde_json::{Value, json};

use super::*;

fn sampler(num_examples: usize, batch_size: usize, world_size: usize) -> Sampler {
    Sampler {
        num_examples,
        batch_size,
        world_size,
        order: Order::Shuffled { seed: 42 },
        remainder: Remainder::Keep,
    }
}

/// FNV-1a over little-endian 32-bit words: one number for a list too long to write down.
fn fingerprint(numbers: impl IntoIterator<Item = usize>) -> u64 {
    numbers
        .into_iter()
        .flat_map(|number| (number as u32).to_le_bytes())
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
}

#[test]
fn permutations_are_torchs() {
    assert_eq!(torch_randperm(10, 42), [2, 6, 1, 8, 4, 5, 0, 9, 3, 7]);
    assert_eq!(torch_randperm(10, 43), [8, 4, 9, 0, 5, 1, 6, 7, 2, 3]);
    let reference = torch_randperm(2030, 42);
    assert_eq!(reference[..8], [582, 762, 138, 165, 1984, 790, 1890, 1412]);
    assert_eq!(fingerprint(reference), 14_279_981_518_719_829_712);
    assert_eq!(
        fingerprint(torch_randperm(2030, 45)),
        13_539_831_513_314_472_240
    );
}

#[test]
fn one_rank_keeps_its_short_last_batch() {
    let batches = sampler(10, 4, 1).epoch(1, 0);
    assert_eq!(batches, [vec![8, 4, 9, 0], vec![5, 1, 6, 7], vec![2, 3]]);
}

#[test]
fn ranks_take_batches_in_turn_and_the_end_wraps_around() {
    let sampler = sampler(10, 3, 2);
    assert_eq!(sampler.epoch(0, 0), [[2, 6, 1], [0, 9, 3]]);
    assert_eq!(sampler.epoch(0, 1), [[8, 4, 5], [7, 2, 6]]);
}

#[test]
fn fewer_examples_than_ranks_are_repeated() {
    let sampler = sampler(3, 2, 4);
    let ranks: Vec<_> = (0..4).map(|rank| sampler.epoch(0, rank)).collect();
    assert_eq!(ranks, [[[0, 2]], [[1, 0]], [[2, 1]], [[0, 2]]]);
}

#[test]
fn the_reference_data_is_sharded_as_by_accelerate() {
    let rank = |world_size, rank| {
        let sampler = sampler(2030, 4, world_size);
        fingerprint(sampler.epoch(3, rank).into_iter().flatten())
    };
    assert_eq!(rank(1, 0), fingerprint(torch_randperm(2030, 45)));
    assert_eq!(rank(2, 0), 980_299_499_116_654_676);
    assert_eq!(rank(2, 1), 10_926_164_876_547_234_345);
    let eight = [
        14_721_316_762_193_942_960,
        7_663_437_445_308_076_529,
        13_262_215_540_378_524_676,
        5_484_115_921_467_264_636,
        12_347_867_768_083_895_491,
        9_874_819_676_060_879_152,
        7_731_425_905_562_067_237,
        5_473_977_104_740_011_692,
    ];
    for (index, expected) in eight.into_iter().enumerate() {
        assert_eq!(rank(8, index), expected, "rank {index}");
    }
}

#[test]
fn every_small_shape_is_sharded_as_by_accelerate() {
    let mut all = Vec::new();
    for num_examples in 1..14 {
        for batch_size in 1..5 {
            for world_size in 2..6 {
                for remainder in [Remainder::Keep, Remainder::Drop] {
                    let drop = usize::from(remainder == Remainder::Drop);
                    all.extend([num_examples, batch_size, world_size, drop]);
                    let sampler = Sampler {
                        remainder,
                        ..sampler(num_examples, batch_size, world_size)
                    };
                    for rank in 0..world_size {
                        let batches = sampler.epoch(0, rank);
                        assert_eq!(batches.len(), sampler.batches_per_epoch());
                        all.push(batches.len());
                        for batch in batches {
                            all.push(batch.len());
                            all.extend(batch);
                        }
                    }
                }
            }
        }
    }
    assert_eq!(all.len(), 7824);
    assert_eq!(fingerprint(all), 12_634_156_471_653_785_761);
}

#[test]
fn sequential_order_is_the_data_s() {
    let sampler = Sampler {
        order: Order::Sequential,
        ..sampler(5, 2, 1)
    };
    assert_eq!(sampler.epoch(7, 0).concat(), [0, 1, 2, 3, 4]);
}

#[test]
fn an_empty_data_set_has_no_batches() {
    assert!(sampler(0, 4, 2).epoch(0, 1).is_empty());
}

/// Returns the fixture of this name, made by `scripts/` with accelerate 1.1.1 and numpy.
fn golden(name: &str) -> Value {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/training/order");
    let text = std::fs::read_to_string(format!("{dir}/{name}.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn number(value: &Value, key: &str) -> usize {
    value[key].as_u64().unwrap() as usize
}

#[test]
fn every_golden_epoch_and_shard_is_accelerates() {
    for epoch in golden("sampler")["epochs"].as_array().unwrap() {
        let seed = number(epoch, "seed") as u64;
        let number_of_epoch = number(epoch, "epoch") as u64;
        let num_examples = number(epoch, "num_examples");
        let permutation = torch_randperm(num_examples, seed + number_of_epoch);
        assert_eq!(json!(permutation), epoch["permutation"]);
        for shard in epoch["shards"].as_array().unwrap() {
            let sampler = Sampler {
                order: Order::Shuffled { seed },
                ..sampler(
                    num_examples,
                    number(shard, "batch_size"),
                    number(shard, "world_size"),
                )
            };
            for (rank, expected) in shard["ranks"].as_array().unwrap().iter().enumerate() {
                let batches = sampler.epoch(number_of_epoch, rank);
                match expected {
                    Value::Array(_) => assert_eq!(json!(batches), *expected),
                    // Long ones are given by their ends.
                    _ => {
                        assert_eq!(json!(batches.len()), expected["num_batches"]);
                        assert_eq!(json!(batches.first()), expected["first"]);
                        assert_eq!(json!(batches.last()), expected["last"]);
                    }
                }
            }
        }
    }
}
