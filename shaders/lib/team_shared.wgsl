// Teams of lanes that share rows of a matrix: LANES neighbours, which sum through workgroup memory.
// Constants: WORKGROUP, TEAMS, LANES = WORKGROUP / TEAMS; OUTPUTS, the sums of a lane.

// What is the same for all lanes stands beside it: in one struct browsers take all for different.
struct Invocation {
  @builtin(local_invocation_index) lane: u32,
}

// A lane's place: its rank among the `width` lanes of team `first`, later of team `first + step` ...
struct Team {
  first: u32,
  step: u32,
  turns: u32, // the same for all lanes
  rank: u32,
  width: u32,
}

const LANES = WORKGROUP / TEAMS;
var<workgroup> team_sums: array<f32, OUTPUTS * WORKGROUP>; // [OUTPUTS, TEAMS, LANES]

fn team_of(at: Invocation) -> Team {
  return Team(at.lane / LANES, TEAMS, 1u, at.lane % LANES, LANES);
}

// All lanes leave their sums; after a barrier any lane asks for a team's total.
fn team_leave(team: u32, rank: u32, sums: array<f32, OUTPUTS>) {
  var all = sums;
  for (var i = 0u; i < OUTPUTS; i++) {
    team_sums[i * WORKGROUP + team * LANES + rank] = all[i];
  }
}

fn team_total(team: u32, output: u32, lane: u32) -> f32 {
  var total = 0.0;
  for (var i = 0u; i < LANES; i++) {
    // Lanes that ask at once start at different ones: all memory banks work.
    total += team_sums[output * WORKGROUP + team * LANES + (i + lane) % LANES];
  }
  return total;
}
