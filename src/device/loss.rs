//! The words in which a lost step is told, the same on every device.

/// An operation, by its number in progress words and records.
pub fn operation_name(operation: u32) -> &'static str {
    match operation {
        1 => "dispatch",
        2 => "combine",
        3 => "the end of a dispatch without combine",
        4 => "a dispatch that replays a routing (REUSE)",
        _ => "nothing yet",
    }
}

/// A word of the shape that combine compares.
pub fn result_word(word: usize) -> &'static str {
    const WORDS: [&str; 3] = [
        "the hidden size of the experts' rows",
        "the element type of the experts' rows (0 bf16, 1 f16, 2 f32)",
        "the presence of row_weights (0 absent, 1 present)",
    ];
    WORDS[word]
}

/// Ranks, as a sentence names them.
pub fn list(ranks: &[u32]) -> String {
    let numbers: Vec<String> = ranks.iter().map(|r| r.to_string()).collect();
    format!("rank{} {}", if ranks.len() == 1 { "" } else { "s" }, numbers.join(", "))
}
