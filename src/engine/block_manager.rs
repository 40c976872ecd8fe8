//! Hands out KV blocks, counts their holders and finds blocks that hold a known prefix.
//!
//! A full block may be shared: it is entered into the prefix cache under a hash of its tokens
//! and of all tokens before it. A block that nobody holds stays in the cache, in a list of free
//! blocks ordered by last use, until its memory is needed. Blocks that are not full belong to
//! one sequence and are the only ones written, so a shared block never changes. Where a prompt
//! goes on as a cached block begins, that beginning is copied into the sequence's own block.
//!
//! Called by the scheduler alone. Knows block numbers, not their contents.
//! The design is vLLM's (`vllm/v1/core/block_pool.py`).

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use sha2::{Digest, Sha256};

/// SHA-256 over a block's tokens and its predecessor's hash, so it names a whole prefix.
///
/// The full digest is kept: two prefixes with one hash would leak one request's context into
/// another, and requests come from strangers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct BlockHash([u8; 32]);

impl BlockHash {
    /// Hashes a full block that follows `parent`; `None` stands for the start of the sequence.
    pub(super) fn of(parent: Option<&Self>, token_ids: &[u32]) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(parent.map_or([0; 32], |parent| parent.0));
        for token_id in token_ids {
            hasher.update(token_id.to_le_bytes());
        }
        Self(hasher.finalize().into())
    }
}

/// Whether full blocks are shared between sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PrefixCaching {
    /// Full blocks are found again by later sequences.
    Enabled,
    /// Each sequence computes all its tokens.
    Disabled,
}

/// No block is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OutOfBlocks;

#[derive(Debug, Clone)]
struct Block {
    /// Tables that contain the block; 0 means that it is in the free list.
    ref_count: u32,
    /// Set while the prefix cache points here.
    cached: Option<Box<CachedBlock>>,
    /// Neighbours in the free list, meaningful only while the block is in it.
    previous: u32,
    next: u32,
}

/// Of the blocks that follow a prefix so many are looked at for a common beginning: after a system
/// prompt there may be as many as conversations.
const MAX_BEGINNINGS: usize = 64;

/// What the prefix cache knows of a block.
#[derive(Debug, Clone)]
struct CachedBlock {
    /// Names a full block; `None` for one that is only good for copies of its beginning.
    hash: Option<BlockHash>,
    /// Hash of the block before it.
    parent: Option<BlockHash>,
    token_ids: Box<[u32]>,
    /// The step that fills it.
    step: u64,
}

/// A full block's name and contents, as a sequence knows them.
#[derive(Debug, Clone, Copy)]
pub(super) struct FullBlock<'a> {
    pub(super) hash: BlockHash,
    /// Hash of the block before it; `None` at the start of the sequence.
    pub(super) parent: Option<BlockHash>,
    pub(super) token_ids: &'a [u32],
}

/// All KV blocks of the cache.
#[derive(Debug)]
pub(super) struct BlockManager {
    block_size: usize,
    prefix_caching: PrefixCaching,
    /// One entry a block, then the free list's sentinel, whose `next` is the block to use next.
    blocks: Vec<Block>,
    num_free: usize,
    cached: HashMap<BlockHash, u32>,
    /// The cached blocks that follow each cached prefix.
    children: HashMap<Option<BlockHash>, Vec<u32>>,
    /// Number of the step being scheduled.
    step: u64,
}

impl BlockManager {
    /// Makes `num_blocks` free blocks of `block_size` tokens.
    ///
    /// # Panics
    /// If a block holds no token or the blocks can not be numbered by `u32`.
    pub(super) fn new(num_blocks: usize, block_size: usize, prefix_caching: PrefixCaching) -> Self {
        assert!(block_size > 0, "a block holds at least one token");
        let sentinel = u32::try_from(num_blocks).expect("block numbers fit u32");
        // Links 0, 1, … in a ring through the sentinel, so that neither end is a special case.
        let blocks = (0..=sentinel)
            .map(|block| Block {
                ref_count: 0,
                cached: None,
                previous: block.checked_sub(1).unwrap_or(sentinel),
                next: if block == sentinel { 0 } else { block + 1 },
            })
            .collect();
        Self {
            block_size,
            prefix_caching,
            blocks,
            num_free: num_blocks,
            cached: HashMap::new(),
            children: HashMap::new(),
            step: 0,
        }
    }

    /// Takes note that all scheduled so far has run.
    pub(super) fn begin_step(&mut self) {
        self.step += 1;
    }

    pub(super) fn block_size(&self) -> usize {
        self.block_size
    }

    pub(super) fn prefix_caching(&self) -> PrefixCaching {
        self.prefix_caching
    }

    pub(super) fn num_blocks(&self) -> usize {
        self.blocks.len() - 1
    }

    /// Returns the blocks held by sequences.
    pub(super) fn num_used_blocks(&self) -> usize {
        self.num_blocks() - self.num_free
    }

    /// Returns how many blocks `num_tokens` tokens fill, the last one perhaps in part.
    pub(super) fn num_blocks_for(&self, num_tokens: usize) -> usize {
        num_tokens.div_ceil(self.block_size)
    }

    /// Returns how many leading hashes the prefix cache knows.
    pub(super) fn num_cached_blocks(&self, hashes: &[BlockHash]) -> usize {
        hashes
            .iter()
            .take_while(|hash| self.cached.contains_key(hash))
            .count()
    }

    /// Returns whether the cached blocks of `prefix` were all filled by steps before this one.
    ///
    /// # Panics
    /// If the cache does not know all of `prefix`.
    pub(super) fn are_computed(&self, prefix: &[BlockHash]) -> bool {
        prefix.iter().all(|hash| {
            let cached = self.blocks[self.cached[hash] as usize].cached.as_deref();
            cached.is_none_or(|cached| cached.step < self.step)
        })
    }

    /// Returns the cached block after `parent` that begins like `token_ids` for longest, with the
    /// length of that beginning. Blocks that only this step fills have nothing to copy yet.
    pub(super) fn longest_beginning(
        &self,
        parent: Option<BlockHash>,
        token_ids: &[u32],
    ) -> Option<(u32, usize)> {
        let common = |cached: &CachedBlock| {
            let pairs = cached.token_ids.iter().zip(token_ids);
            pairs.take_while(|(ours, theirs)| ours == theirs).count()
        };
        let children = self.children.get(&parent)?;
        let newest = &children[children.len().saturating_sub(MAX_BEGINNINGS)..];
        let candidates = newest.iter().filter_map(|&block| {
            let cached = self.blocks[block as usize].cached.as_deref()?;
            (cached.step < self.step).then(|| (block, common(cached)))
        });
        candidates
            .filter(|&(_, len)| len > 0)
            .max_by_key(|&(_, len)| len)
    }

    /// Fills an empty table with the cached blocks of `prefix` and new blocks for the rest of
    /// `num_tokens` tokens. Takes all or nothing.
    ///
    /// # Errors
    /// [`OutOfBlocks`] when the new blocks, and those cached ones that nobody holds, are more
    /// than the free ones.
    ///
    /// # Panics
    /// If the cache does not know all of `prefix`.
    pub(super) fn allocate(
        &mut self,
        prefix: &[BlockHash],
        num_tokens: usize,
        block_table: &mut Vec<u32>,
    ) -> Result<(), OutOfBlocks> {
        debug_assert!(block_table.is_empty(), "the sequence holds blocks already");
        let num_unheld = prefix
            .iter()
            .filter(|&hash| self.blocks[self.cached[hash] as usize].ref_count == 0)
            .count();
        let num_new = self.num_blocks_for(num_tokens) - prefix.len();
        if num_new + num_unheld > self.num_free {
            return Err(OutOfBlocks);
        }
        block_table.reserve(prefix.len() + num_new);
        // The prefix first: taking new blocks could evict it.
        for hash in prefix {
            let block = self.cached[hash];
            if self.blocks[block as usize].ref_count == 0 {
                self.unlink(block);
            }
            self.blocks[block as usize].ref_count += 1;
            block_table.push(block);
        }
        self.grow(num_tokens, block_table)
    }

    /// Appends new blocks until the table holds `num_tokens` tokens. Takes all or nothing.
    ///
    /// # Errors
    /// [`OutOfBlocks`] when too few are free.
    pub(super) fn grow(
        &mut self,
        num_tokens: usize,
        block_table: &mut Vec<u32>,
    ) -> Result<(), OutOfBlocks> {
        let num_wanted = self.num_blocks_for(num_tokens);
        let num_new = num_wanted.saturating_sub(block_table.len());
        if num_new > self.num_free {
            return Err(OutOfBlocks);
        }
        for _ in 0..num_new {
            let block = self.blocks[self.sentinel() as usize].next;
            self.unlink(block);
            self.forget(block);
            self.blocks[block as usize].ref_count = 1;
            block_table.push(block);
        }
        Ok(())
    }

    /// Enters a block that is full, or will be before anyone reads it, into the prefix cache.
    ///
    /// Of several blocks with the same contents the first is the cached one; the others go back
    /// to the free list as plain memory.
    pub(super) fn register(&mut self, block: u32, contents: FullBlock<'_>) {
        if self.prefix_caching == PrefixCaching::Disabled {
            return;
        }
        let FullBlock {
            hash,
            parent,
            token_ids,
        } = contents;
        if let Entry::Vacant(entry) = self.cached.entry(hash) {
            entry.insert(block);
            self.enter(block, Some(hash), parent, token_ids);
        }
    }

    /// Keeps a block that is not full, and will not be written any more, as a source of copies,
    /// unless the cache has all of it already.
    pub(super) fn register_beginning(
        &mut self,
        block: u32,
        parent: Option<BlockHash>,
        token_ids: &[u32],
    ) {
        let known = self.longest_beginning(parent, token_ids);
        let is_known = known.is_some_and(|(_, len)| len == token_ids.len());
        if self.prefix_caching == PrefixCaching::Enabled && !is_known {
            self.enter(block, None, parent, token_ids);
        }
    }

    fn enter(
        &mut self,
        block: u32,
        hash: Option<BlockHash>,
        parent: Option<BlockHash>,
        token_ids: &[u32],
    ) {
        self.children.entry(parent).or_default().push(block);
        self.blocks[block as usize].cached = Some(Box::new(CachedBlock {
            hash,
            parent,
            token_ids: token_ids.into(),
            step: self.step,
        }));
    }

    /// Takes a block out of the prefix cache, if it is there.
    pub(super) fn forget(&mut self, block: u32) {
        let Some(cached) = self.blocks[block as usize].cached.take() else {
            return;
        };
        if let Some(hash) = cached.hash {
            self.cached.remove(&hash);
        }
        if let Entry::Occupied(mut siblings) = self.children.entry(cached.parent) {
            siblings.get_mut().retain(|&sibling| sibling != block);
            if siblings.get().is_empty() {
                siblings.remove();
            }
        }
    }

    /// Gives up a sequence's hold on its blocks and empties the table.
    pub(super) fn free(&mut self, block_table: &mut Vec<u32>) {
        // From the tail: a longer prefix is of use to fewer sequences, and a block is found only
        // through its predecessors, so the tail must be evicted first.
        for block in block_table.drain(..).rev() {
            let entry = &mut self.blocks[block as usize];
            entry.ref_count -= 1;
            if entry.ref_count > 0 {
                continue;
            }
            // What the cache does not know is used before anything of the cache is evicted.
            if entry.cached.is_some() {
                let last = self.blocks[self.sentinel() as usize].previous;
                self.link_after(last, block);
            } else {
                self.link_after(self.sentinel(), block);
            }
        }
    }

    fn sentinel(&self) -> u32 {
        // `new` checked that the number of blocks fits.
        self.num_blocks() as u32
    }

    fn unlink(&mut self, block: u32) {
        let Block { previous, next, .. } = self.blocks[block as usize];
        self.blocks[previous as usize].next = next;
        self.blocks[next as usize].previous = previous;
        self.num_free -= 1;
    }

    fn link_after(&mut self, previous: u32, block: u32) {
        let next = self.blocks[previous as usize].next;
        self.blocks[previous as usize].next = block;
        self.blocks[next as usize].previous = block;
        self.blocks[block as usize].previous = previous;
        self.blocks[block as usize].next = next;
        self.num_free += 1;
    }
}

#[cfg(test)]
impl BlockManager {
    /// Returns the number of tables a block is in.
    pub(super) fn ref_count(&self, block: u32) -> u32 {
        self.blocks[block as usize].ref_count
    }

    /// Returns the hash under which a block is cached.
    pub(super) fn hash(&self, block: u32) -> Option<BlockHash> {
        let cached = self.blocks[block as usize].cached.as_deref();
        cached.and_then(|cached| cached.hash)
    }

    /// Checks what must hold between any two calls.
    pub(super) fn assert_consistent(&self) {
        let sentinel = self.sentinel();
        let mut num_listed = 0;
        let mut block = self.blocks[sentinel as usize].next;
        while block != sentinel {
            let entry = &self.blocks[block as usize];
            assert_eq!(entry.ref_count, 0, "held block {block} is in the free list");
            assert_eq!(self.blocks[entry.next as usize].previous, block);
            num_listed += 1;
            assert!(num_listed <= self.num_blocks(), "the free list has a loop");
            block = entry.next;
        }
        assert_eq!(num_listed, self.num_free, "free list and its count differ");
        let entries = &self.blocks[..self.num_blocks()];
        let num_held = entries.iter().filter(|entry| entry.ref_count > 0).count();
        assert_eq!(num_held + self.num_free, self.num_blocks());
        let cached: Vec<_> = entries
            .iter()
            .filter_map(|entry| entry.cached.as_deref())
            .collect();
        let num_hashed = cached.iter().filter(|cached| cached.hash.is_some()).count();
        assert_eq!(num_hashed, self.cached.len());
        for (hash, &block) in &self.cached {
            assert_eq!(self.hash(block), Some(*hash));
        }
        let num_children: usize = self.children.values().map(Vec::len).sum();
        assert_eq!(num_children, cached.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manager(num_blocks: usize) -> BlockManager {
        BlockManager::new(num_blocks, 2, PrefixCaching::Enabled)
    }

    fn hashes(token_ids: &[u32]) -> Vec<BlockHash> {
        let mut hashes: Vec<BlockHash> = Vec::new();
        for block in token_ids.chunks_exact(2) {
            hashes.push(BlockHash::of(hashes.last(), block));
        }
        hashes
    }

    /// Allocates, registers the full blocks as if they were computed, and returns the table.
    fn fill(manager: &mut BlockManager, token_ids: &[u32]) -> Vec<u32> {
        let hashes = hashes(token_ids);
        let mut table = Vec::new();
        let cached = manager.num_cached_blocks(&hashes);
        manager
            .allocate(&hashes[..cached], token_ids.len(), &mut table)
            .unwrap();
        for (index, (&block, &hash)) in table.iter().zip(&hashes).enumerate() {
            if manager.hash(block).is_none() {
                let contents = FullBlock {
                    hash,
                    parent: index.checked_sub(1).map(|parent| hashes[parent]),
                    token_ids: &token_ids[2 * index..2 * index + 2],
                };
                manager.register(block, contents);
            }
        }
        manager.assert_consistent();
        table
    }

    #[test]
    fn hash_depends_on_tokens_order_and_parent() {
        let first = BlockHash::of(None, &[1, 2]);
        assert_ne!(first, BlockHash::of(None, &[2, 1]));
        assert_ne!(
            BlockHash::of(Some(&first), &[3, 4]),
            BlockHash::of(None, &[3, 4])
        );
    }

    #[test]
    fn cached_prefix_is_shared_and_counted() {
        let mut manager = manager(8);
        let first = fill(&mut manager, &[1, 2, 3, 4, 5]);
        let second = fill(&mut manager, &[1, 2, 3, 4, 6]);
        assert_eq!(first[..2], second[..2]);
        assert_ne!(first[2], second[2]);
        assert_eq!(manager.ref_count(first[0]), 2);
        assert_eq!(manager.num_used_blocks(), 4);
    }

    #[test]
    fn beginning_of_a_block_is_found_after_its_own_prefix_once_it_is_computed() {
        let mut manager = manager(8);
        let table = fill(&mut manager, &[1, 2, 3, 4]);
        let parent = hashes(&[1, 2]).pop();
        assert_eq!(
            manager.longest_beginning(parent, &[3]),
            None,
            "not yet computed"
        );
        manager.begin_step();
        assert_eq!(
            manager.longest_beginning(parent, &[3, 9]),
            Some((table[1], 1))
        );
        assert_eq!(
            manager.longest_beginning(parent, &[3, 4]),
            Some((table[1], 2))
        );
        assert_eq!(manager.longest_beginning(parent, &[9]), None);
        assert_eq!(
            manager.longest_beginning(None, &[3]),
            None,
            "another prefix"
        );
    }

    #[test]
    fn same_block_after_another_prefix_is_not_shared() {
        let mut manager = manager(8);
        let first = fill(&mut manager, &[1, 2, 3, 4]);
        let second = fill(&mut manager, &[9, 9, 3, 4]);
        assert!(first.iter().all(|block| !second.contains(block)));
    }

    #[test]
    fn freed_blocks_stay_cached_until_their_memory_is_needed() {
        let mut manager = manager(4);
        let mut first = fill(&mut manager, &[1, 2, 3, 4]);
        let want = first.clone();
        manager.free(&mut first);
        assert!(first.is_empty());
        assert_eq!(manager.num_used_blocks(), 0);
        assert_eq!(fill(&mut manager, &[1, 2, 3, 4]), want);
    }

    #[test]
    fn tail_of_the_least_recently_freed_prefix_is_evicted_first() {
        let mut manager = manager(4);
        let mut old = fill(&mut manager, &[1, 2, 3, 4]);
        let mut new = fill(&mut manager, &[5, 6, 7, 8]);
        manager.free(&mut old);
        manager.free(&mut new);
        let mut table = Vec::new();
        manager.grow(2, &mut table).unwrap();
        assert_eq!(manager.num_cached_blocks(&hashes(&[1, 2, 3, 4])), 1);
        assert_eq!(manager.num_cached_blocks(&hashes(&[5, 6, 7, 8])), 2);
        manager.grow(4, &mut table).unwrap();
        assert_eq!(manager.num_cached_blocks(&hashes(&[1, 2, 3, 4])), 0);
        assert_eq!(manager.num_cached_blocks(&hashes(&[5, 6, 7, 8])), 2);
        manager.grow(6, &mut table).unwrap();
        assert_eq!(manager.num_cached_blocks(&hashes(&[5, 6, 7, 8])), 1);
        manager.assert_consistent();
    }

    #[test]
    fn blocks_outside_the_cache_are_used_before_cached_ones() {
        let mut manager = manager(3);
        let mut cached = fill(&mut manager, &[1, 2]);
        let mut partial = fill(&mut manager, &[9]);
        let mut spare = fill(&mut manager, &[8]);
        manager.free(&mut cached);
        manager.free(&mut partial);
        manager.free(&mut spare);
        manager.grow(4, &mut Vec::new()).unwrap();
        assert_eq!(manager.num_cached_blocks(&hashes(&[1, 2])), 1);
    }

    #[test]
    fn allocation_takes_all_or_nothing() {
        let mut manager = manager(3);
        let mut cached = fill(&mut manager, &[1, 2, 3, 4]);
        manager.free(&mut cached);
        let mut table = Vec::new();
        // Two cached blocks leave the free list, one new block remains: four are one too many.
        let prefix = hashes(&[1, 2, 3, 4]);
        assert_eq!(manager.allocate(&prefix, 8, &mut table), Err(OutOfBlocks));
        assert!(table.is_empty());
        assert_eq!(manager.num_used_blocks(), 0);
        assert_eq!(manager.allocate(&prefix, 6, &mut table), Ok(()));
        assert_eq!(manager.grow(7, &mut table), Err(OutOfBlocks));
        assert_eq!(table.len(), 3);
        manager.assert_consistent();
    }

    #[test]
    fn disabled_cache_finds_nothing() {
        let mut manager = BlockManager::new(4, 2, PrefixCaching::Disabled);
        fill(&mut manager, &[1, 2, 3, 4]);
        assert_eq!(manager.num_cached_blocks(&hashes(&[1, 2, 3, 4])), 0);
    }
}
