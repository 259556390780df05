// Teams of lanes that share rows of a matrix: subgroups, of whatever width. team_shared says what the
// functions are.
// Constants: WORKGROUP, TEAMS; OUTPUTS, the sums of a lane.

struct Invocation {
  @builtin(local_invocation_index) lane: u32,
  @builtin(subgroup_id) subgroup: u32,
  @builtin(num_subgroups) subgroups: u32,
}

struct Team {
  first: u32,
  step: u32,
  turns: u32,
  rank: u32,
  width: u32,
}

const TEAM_SPACE = (OUTPUTS * TEAMS + 3u) / 4u * 4u;
var<workgroup> team_sums: array<f32, TEAM_SPACE>; // [TEAMS, OUTPUTS]

fn team_of(at: Invocation) -> Team {
  let turns = (TEAMS + at.subgroups - 1u) / at.subgroups;
  // Counted, not asked for: a subgroup may have fewer lanes than the adapter's width.
  return Team(at.subgroup, at.subgroups, turns, subgroupExclusiveAdd(1u), subgroupAdd(1u));
}

fn team_leave(team: u32, rank: u32, sums: array<f32, OUTPUTS>) {
  var all = sums;
  for (var i = 0u; i < OUTPUTS; i++) {
    all[i] = subgroupAdd(all[i]);
  }
  if (rank == 0u && team < TEAMS) {
    for (var i = 0u; i < OUTPUTS; i++) {
      team_sums[team * OUTPUTS + i] = all[i];
    }
  }
}

fn team_total(team: u32, output: u32, lane: u32) -> f32 {
  return team_sums[team * OUTPUTS + output];
}
