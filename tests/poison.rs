//! Views end with this rank's combine SEND. A debug build of the library writes 0xFF over their tokens then, so that
//! a caller who reads on notices; a release build leaves them alone.

use std::time::Duration;

use a2a::abi::types::*;

#[allow(dead_code, reason = "each test binary uses a part")]
mod common;

use common::*;

const LIMIT: Duration = Duration::from_secs(60);
const TOKENS: usize = 6;
const HIDDEN: usize = 32;
const EXPERTS: usize = 4;
const TOPK: usize = 2;

/// One step of which every rank receives rows: what the views hold after dispatch, and after combine SEND.
fn views_after_send(backend: a2a_backend_t, layout: a2a_layout_t) {
    threads(2, LIMIT, move |seat| {
        let mut config = config(seat);
        (config.backend, config.layout) = (backend, layout);
        config.num_experts = EXPERTS as i32;
        config.max_topk = TOPK as i32;
        config.max_hidden = HIDDEN as i32;
        config.max_tokens = TOKENS as i32;
        let comm = Comm::create(&config)?;
        let routing = comm.routing(0)?;
        let ids: Vec<u8> = (0..TOKENS * TOPK).flat_map(|at| ((at % EXPERTS) as i32).to_le_bytes()).collect();
        let input = DispatchIn {
            tokens: Some(Tensor::of(BF16, &[TOKENS, HIDDEN], &[7; TOKENS * HIDDEN * 2])),
            topk_ids: Some(Tensor::of(I32, &[TOKENS, TOPK], &ids)),
            ..Default::default()
        };
        let view = || Some(Tensor::view());
        let mut output = DispatchOut { tokens: view(), row_source: view(), ..Default::default() };
        comm.dispatch(&routing, A2A_PHASE_BOTH, &input, &mut output)?;
        let tokens = output.tokens.expect("wanted");
        let sources = output.row_source.expect("wanted").read_i32();
        let received = |bytes: Vec<u8>| -> Vec<Vec<u8>> {
            let rows = bytes.chunks_exact(HIDDEN * 2).zip(sources.chunks_exact(2));
            rows.filter(|(_, source)| source[0] >= 0).map(|(row, _)| row.to_vec()).collect()
        };
        let before = received(tokens.read());
        if before.is_empty() || before.iter().flatten().any(|&byte| byte != 7) {
            return Err(format!("dispatch: {before:?}"));
        }

        let mut rows = comm.combine_buffer(&routing, BF16)?;
        let elements: usize = rows.shape().iter().product();
        rows.write(&vec![0; 2 * elements]);
        let mut sums =
            CombineOut { tokens: Some(Tensor::new(BF16, &[TOKENS, HIDDEN])), ..Default::default() };
        comm.combine(&routing, A2A_PHASE_SEND, 0, Some(&rows), &mut sums)?;
        // The view is over, its memory is not: nobody writes there before the next dispatch.
        let after = received(tokens.read());
        let expected = if cfg!(debug_assertions) { 0xff } else { 7 };
        comm.combine(&routing, A2A_PHASE_RECV, 0, None, &mut sums)?;
        let sums = sums.tokens.expect("given").read();
        if sums.iter().any(|&byte| byte != 0) {
            return Err(format!("combine: {sums:?}"));
        }
        match after.iter().flatten().find(|&&byte| byte != expected) {
            None => Ok(()),
            Some(byte) => Err(format!("after combine SEND a view holds {byte:#x}, expected {expected:#x}")),
        }
    })
    .unwrap();
}

#[test]
fn one_sided() {
    views_after_send(A2A_BACKEND_NVLINK_ONE_SIDED, A2A_LAYOUT_RANK_MAJOR);
}

#[test]
fn allgather() {
    views_after_send(A2A_BACKEND_ALLGATHER_REDUCESCATTER, A2A_LAYOUT_GATHERED);
}

#[test]
fn high_throughput() {
    views_after_send(A2A_BACKEND_HIGH_THROUGHPUT, A2A_LAYOUT_FLAT);
    views_after_send(A2A_BACKEND_HIGH_THROUGHPUT, A2A_LAYOUT_EXPERT_CONTIGUOUS);
}

#[test]
fn low_latency() {
    views_after_send(A2A_BACKEND_LOW_LATENCY, A2A_LAYOUT_EXPERT_PADDED);
}
