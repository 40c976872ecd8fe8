//! Ranks and their collectives.
//!
//! A rank is one thread that owns its device, its part of the model and its [`Comm`]. Nothing but
//! the values that a collective exchanges crosses ranks. Knows nothing of layers or engines.

mod local;

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use candle_core::{Result, Tensor};

use local::LocalGroup;

/// One rank's end of a group: its place, and the collectives of the group.
///
/// Every rank of a group must call the same collectives in the same order.
pub struct Comm {
    rank: usize,
    world_size: usize,
    /// `None` for a group of one, whose collectives are the identity.
    group: Option<Arc<LocalGroup>>,
}

impl Comm {
    /// Returns the only rank of a group of one.
    pub fn single() -> Self {
        Self {
            rank: 0,
            world_size: 1,
            group: None,
        }
    }

    /// Returns the ranks of a group inside this process, to be moved to one thread each. They
    /// wait for each other without end.
    pub fn local_group(world_size: usize) -> Vec<Self> {
        Self::group(world_size, None)
    }

    /// Returns the ranks of a group inside this process, whose collectives fail with the names of
    /// the ranks that have not come within `timeout`.
    pub fn local_group_within(world_size: usize, timeout: Duration) -> Vec<Self> {
        Self::group(world_size, Some(timeout))
    }

    fn group(world_size: usize, timeout: Option<Duration>) -> Vec<Self> {
        if world_size == 1 {
            return vec![Self::single()];
        }
        let group = Arc::new(LocalGroup::new(world_size, timeout));
        (0..world_size)
            .map(|rank| Self {
                rank,
                world_size,
                group: Some(Arc::clone(&group)),
            })
            .collect()
    }

    /// Returns this rank's place in the group, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Returns the number of ranks.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// Returns the sum over ranks of `tensor` (f32, the same shape on each), added in rank order.
    ///
    /// # Errors
    /// When another rank has ended or has not come in time, or shapes differ.
    pub fn all_reduce(&self, tensor: &Tensor) -> Result<Tensor> {
        let Some(group) = &self.group else {
            return Ok(tensor.clone());
        };
        let parts = group.exchange("all_reduce", self.rank, to_values(tensor)?)?;
        let mut sum = vec![0f32; tensor.elem_count()];
        for part in parts.iter() {
            if part.len() != sum.len() {
                candle_core::bail!(
                    "all_reduce: {} values on one rank, {} on another",
                    part.len(),
                    sum.len()
                );
            }
            for (total, value) in sum.iter_mut().zip(part.iter()) {
                *total += value;
            }
        }
        Tensor::from_vec(sum, tensor.shape(), tensor.device())
    }

    /// Returns the sum over ranks of `values` (the same number on each), added in rank order.
    ///
    /// # Errors
    /// When another rank has ended or lengths differ.
    pub fn all_reduce_values(&self, values: Vec<f32>) -> Result<Vec<f32>> {
        let len = values.len();
        self.reduce_scatter(values, 0..len)
    }

    /// Returns elements `part` of the sum over ranks of `values` (the same number on each),
    /// added in rank order.
    ///
    /// # Errors
    /// When another rank has ended or lengths differ.
    pub fn reduce_scatter(&self, values: Vec<f32>, part: Range<usize>) -> Result<Vec<f32>> {
        let Some(group) = &self.group else {
            return Ok(match part.len() == values.len() {
                true => values,
                false => values[part].to_vec(),
            });
        };
        let len = values.len();
        let parts = group.exchange("reduce_scatter", self.rank, values)?;
        let mut sum = vec![0f32; part.len()];
        for values in parts.iter() {
            if values.len() != len {
                candle_core::bail!("a sum of {len} and {} values", values.len());
            }
            for (total, value) in sum.iter_mut().zip(&values[part.clone()]) {
                *total += value;
            }
        }
        Ok(sum)
    }

    /// Returns every rank's values, one rank after another; their numbers may differ.
    ///
    /// # Errors
    /// When another rank has ended.
    pub fn all_gather(&self, values: Vec<f32>) -> Result<Vec<f32>> {
        let Some(group) = &self.group else {
            return Ok(values);
        };
        Ok(group.exchange("all_gather", self.rank, values)?.concat())
    }

    /// Returns every rank's numbers, by rank; how many each gives may differ.
    ///
    /// # Errors
    /// When another rank has ended.
    pub fn all_gather_u64(&self, numbers: &[u64]) -> Result<Vec<Vec<u64>>> {
        let Some(group) = &self.group else {
            return Ok(vec![numbers.to_vec()]);
        };
        // The group carries floats: each number goes as the bits of two, which nothing computes
        // with on the way.
        let halves = |number: &u64| [*number as u32, (*number >> 32) as u32].map(f32::from_bits);
        let values = numbers.iter().flat_map(halves).collect();
        let parts = group.exchange("all_gather_u64", self.rank, values)?;
        let number =
            |pair: &[f32; 2]| u64::from(pair[0].to_bits()) | u64::from(pair[1].to_bits()) << 32;
        let numbers = |part: &Vec<f32>| part.as_chunks().0.iter().map(number).collect();
        Ok(parts.iter().map(numbers).collect())
    }

    /// Returns every rank's bytes, by rank; how many each gives may differ.
    ///
    /// # Errors
    /// When another rank has ended.
    pub fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let Some(group) = &self.group else {
            return Ok(vec![bytes.to_vec()]);
        };
        // Four bytes travel as the bits of one float, the last ones padded with zeros.
        let (words, rest) = bytes.as_chunks();
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        let length = f32::from_bits(rest.len() as u32);
        let ends = [f32::from_le_bytes(last), length];
        let words = words.iter().map(|word| f32::from_le_bytes(*word));
        let parts = group.exchange("all_gather_bytes", self.rank, words.chain(ends).collect())?;
        let unpack = |part: &Vec<f32>| {
            let (words, length) = part.split_at(part.len().saturating_sub(1));
            let rest = length.first().map_or(0, |length| length.to_bits() as usize);
            let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            bytes.truncate((bytes.len() + rest).saturating_sub(4));
            bytes
        };
        Ok(parts.iter().map(unpack).collect())
    }

    /// Returns the sums over ranks of `numbers` (the same number on each), added in rank order.
    ///
    /// # Errors
    /// When another rank has ended or lengths differ.
    pub fn all_reduce_f64(&self, numbers: &[f64]) -> Result<Vec<f64>> {
        let bits: Vec<u64> = numbers.iter().map(|number| number.to_bits()).collect();
        let mut sums = vec![0f64; numbers.len()];
        for part in self.all_gather_u64(&bits)? {
            if part.len() != sums.len() {
                candle_core::bail!("sums of {} and {} numbers", sums.len(), part.len());
            }
            for (sum, bits) in sums.iter_mut().zip(part) {
                *sum += f64::from_bits(bits);
            }
        }
        Ok(sums)
    }

    /// Returns the values of rank `root` on every rank; the others' are not read.
    ///
    /// # Errors
    /// When another rank has ended.
    pub fn broadcast(&self, values: Vec<f32>, root: usize) -> Result<Vec<f32>> {
        let Some(group) = &self.group else {
            return Ok(values);
        };
        let own = if self.rank == root {
            values
        } else {
            Vec::new()
        };
        Ok(group.exchange("broadcast", self.rank, own)?[root].clone())
    }

    /// Waits until every rank has come here.
    ///
    /// # Errors
    /// When another rank has ended.
    pub fn barrier(&self) -> Result<()> {
        match &self.group {
            None => Ok(()),
            Some(group) => group.exchange("barrier", self.rank, Vec::new()).map(drop),
        }
    }

    /// Returns the ranks' `[rows, cols_i]` tensors (f32) side by side in rank order: `[rows, Σ cols_i]`.
    ///
    /// # Errors
    /// When another rank has ended or `tensor` is not two-dimensional.
    pub fn all_gather_columns(&self, tensor: &Tensor) -> Result<Tensor> {
        let Some(group) = &self.group else {
            return Ok(tensor.clone());
        };
        let (rows, _) = tensor.dims2()?;
        let parts = group.exchange("all_gather_columns", self.rank, to_values(tensor)?)?;
        let num_cols: usize = parts.iter().map(|part| part.len() / rows).sum();
        let mut gathered = Vec::with_capacity(rows * num_cols);
        for row in 0..rows {
            for part in parts.iter() {
                let cols = part.len() / rows;
                gathered.extend_from_slice(&part[row * cols..(row + 1) * cols]);
            }
        }
        Tensor::from_vec(gathered, (rows, num_cols), tensor.device())
    }
}

impl Drop for Comm {
    /// Wakes the other ranks with an error: a rank that left can not answer a collective.
    fn drop(&mut self) {
        if let Some(group) = &self.group {
            group.leave(self.rank);
        }
    }
}

fn to_values(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.flatten_all()?.to_vec1::<f32>()
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn on_ranks<T: Send>(world_size: usize, body: impl Fn(Comm) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = Comm::local_group(world_size)
                .into_iter()
                .map(|comm| scope.spawn(|| body(comm)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        })
    }

    #[test]
    fn all_reduce_sums_over_ranks_many_times() {
        let sums = on_ranks(4, |comm| {
            (0..100)
                .map(|step| {
                    let value = (comm.rank() * 100 + step) as f32;
                    let tensor = Tensor::from_vec(vec![value, 1.0], 2, &Device::Cpu).unwrap();
                    comm.all_reduce(&tensor).unwrap().to_vec1::<f32>().unwrap()
                })
                .collect::<Vec<_>>()
        });
        for rank in sums {
            for (step, sum) in rank.iter().enumerate() {
                assert_eq!(sum, &[600.0 + 4.0 * step as f32, 4.0]);
            }
        }
    }

    #[test]
    fn all_gather_columns_keeps_rows_and_rank_order_with_unequal_parts() {
        let gathered = on_ranks(2, |comm| {
            let cols = comm.rank() + 1;
            let values = (0..2 * cols)
                .map(|i| (comm.rank() * 10 + i) as f32)
                .collect();
            let tensor = Tensor::from_vec(values, (2, cols), &Device::Cpu).unwrap();
            comm.all_gather_columns(&tensor)
                .unwrap()
                .to_vec2::<f32>()
                .unwrap()
        });
        assert_eq!(gathered[0], [[0.0, 10.0, 11.0], [1.0, 12.0, 13.0]]);
        assert_eq!(gathered[0], gathered[1]);
    }

    #[test]
    fn parts_of_sums_gathered_again_are_the_sum() {
        let sums = on_ranks(3, |comm| {
            let values: Vec<f32> = (0..7).map(|i| (comm.rank() * 10 + i) as f32).collect();
            let part = [0..3, 3..6, 6..7][comm.rank()].clone();
            let part = comm.reduce_scatter(values.clone(), part).unwrap();
            let whole = comm.all_reduce_values(values).unwrap();
            assert_eq!(comm.all_gather(part).unwrap(), whole);
            whole
        });
        assert_eq!(sums[2], [30.0, 33.0, 36.0, 39.0, 42.0, 45.0, 48.0]);
    }

    #[test]
    fn numbers_of_64_bits_arrive_whole() {
        let numbers = on_ranks(2, |comm| {
            let own = [u64::MAX - comm.rank() as u64, 0x7fa0_0001_ffa0_0001];
            comm.barrier().unwrap();
            let sums = comm.all_reduce_f64(&[0.1, comm.rank() as f64]).unwrap();
            assert_eq!(sums, [0.2, 1.0]);
            assert_eq!(comm.broadcast(vec![comm.rank() as f32], 1).unwrap(), [1.0]);
            for len in [0, 3, 4, 9] {
                let bytes: Vec<u8> = (0..len + comm.rank() as u8).map(|i| 255 - i).collect();
                let both = comm.all_gather_bytes(&bytes).unwrap();
                assert_eq!(both[comm.rank()], bytes);
                assert_eq!(both[1].len(), both[0].len() + 1);
            }
            comm.all_gather_u64(&own[comm.rank()..]).unwrap()
        });
        let want = vec![
            vec![u64::MAX, 0x7fa0_0001_ffa0_0001],
            vec![0x7fa0_0001_ffa0_0001],
        ];
        assert_eq!(numbers, [want.clone(), want]);
    }

    #[test]
    fn a_rank_that_left_is_an_error_on_the_others_not_a_hang() {
        let errors = on_ranks(2, |comm| {
            if comm.rank() == 1 {
                return String::new();
            }
            let tensor = Tensor::from_vec(vec![1f32], 1, &Device::Cpu).unwrap();
            comm.all_reduce(&tensor).unwrap_err().to_string()
        });
        assert!(errors[0].contains("rank 1 has ended"), "{}", errors[0]);
    }

    #[test]
    fn ranks_that_do_not_come_in_time_are_named_with_the_collective() {
        let comms = Comm::local_group_within(3, Duration::from_millis(20));
        let error = comms[1].broadcast(vec![1.0], 1).unwrap_err().to_string();
        let want = "broadcast on rank 1: rank 0, rank 2 did not come within 20ms";
        assert!(error.starts_with(want), "{error}");
    }
}
