// The products of many experts as one piece of work for all threads.
//
// Some tokens of an expert are a job. Jobs run in batches, as many as memory for copies of their rows allows, and a
// batch in steps, each of which takes all threads through all of its jobs: with few tokens to an expert, it takes many
// experts to keep them busy. Rows that lie as a kernel wants them are not copied; a single token always does.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/scratch.h"
#include "ops/expert_weights.h"

namespace compressed_format {

// Rows of the input, one a token, and of the output, one a place.
struct ExpertRows {
  const char* x = nullptr;
  int64_t x_bytes = 0;         // of a row
  int64_t x_stride_bytes = 0;  // from a row to the next
  char* y = nullptr;
  int64_t y_bytes = 0;
};

// How a kind of problem is given its rows of x: `set(problem, x, stride_bytes)`, and whether they `may_be_apart`.
template <typename Problem>
struct RowsOf;

// Some places of an expert as a problem of a kernel.
template <typename AnyProblem, typename Kernel>
struct ExpertJob {
  using Problem = AnyProblem;

  const Kernel* kernel = nullptr;
  Problem problem;
  Weight weight;
  const int64_t* places = nullptr;
  int64_t tokens = 0;

  // What has to be done of each step: rows of x to copy, parts to prepare, tasks, rows of y to copy.
  int64_t rows_to_gather = 0;
  int64_t parts = 0;
  int64_t tasks = 0;
  int64_t rows_to_scatter = 0;

  // Memory for its batch, and where in it: copied rows of x, those of y, the prepared x.
  size_t bytes = 0;
  char* memory = nullptr;
  size_t y_offset = 0;
  size_t prepared_offset = 0;
};

// Kernels decode weights anew every few hundred tokens, so a job of this many costs no more than a larger one; and
// copies of its rows need not be larger.
constexpr int64_t most_tokens_of_job = 1024;
// What the memory of a batch may come to. A single job may need more.
constexpr size_t most_bytes_of_batch = size_t{32} << 20;
// Below this much to copy or to prepare, waking another thread takes longer than what it would save.
constexpr int64_t bytes_per_thread = 64 * 1024;

inline size_t aligned_bytes(int64_t bytes) { return (static_cast<size_t>(bytes) + 63) / 64 * 64; }

// By how many rows of x each place is further on than the one before; nothing where that differs.
inline std::optional<int64_t> spacing(const int64_t* places, int64_t count, int64_t slots) {
  if (count == 1) return 1;
  const int64_t spacing = places[1] / slots - places[0] / slots;
  for (int64_t i = 2; i < count; ++i) {
    if (places[i] / slots - places[i - 1] / slots != spacing) return std::nullopt;
  }
  return spacing;
}

// Fills in what is to be done for a job that has a kernel, its places, and a problem without rows.
template <typename Job>
void plan_job(Job& job, const ExpertRows& rows, int64_t slots) {
  const int64_t first = job.places[0], last = job.places[job.tokens - 1];
  const std::optional<int64_t> spaced = spacing(job.places, job.tokens, slots);
  const int64_t x_stride_bytes = spaced.has_value() ? *spaced * rows.x_stride_bytes : rows.x_bytes;
  const bool fits = RowsOf<typename Job::Problem>::may_be_apart || job.tokens == 1 || x_stride_bytes == rows.x_bytes;
  job.rows_to_gather = spaced.has_value() && fits ? 0 : job.tokens;
  job.rows_to_scatter = last - first == job.tokens - 1 ? 0 : job.tokens;
  if (job.rows_to_gather == 0) {
    RowsOf<typename Job::Problem>::set(job.problem, rows.x + first / slots * rows.x_stride_bytes, x_stride_bytes);
  }
  if (job.rows_to_scatter == 0) job.problem.y = rows.y + first * rows.y_bytes;

  job.parts = job.kernel->parts(job.problem);
  job.tasks = job.kernel->tasks(job.problem);

  job.y_offset = aligned_bytes(job.rows_to_gather * rows.x_bytes);
  job.prepared_offset = job.y_offset + aligned_bytes(job.rows_to_scatter * rows.y_bytes);
  job.bytes = job.prepared_offset + aligned_bytes(static_cast<int64_t>(job.kernel->prepared_bytes(job.problem)));
}

// Calls function(job, first, last) for ranges that make up, all together, 0 to job.*units of each job.
//
// Each thread gets an equal part of every job, rather than jobs of its own: what jobs cost is only known roughly, as
// kernels work off tokens by the vector. Units that are left over go to one thread after the other.
template <typename Job, typename Function>
void for_all(Job* jobs, size_t count, int64_t Job::*units, int64_t useful_threads, const Function& function) {
  const int64_t threads =
      useful_threads <= 1 ? 1 : std::min<int64_t>(useful_threads, torch::stable::get_num_threads());
  const auto run = [&](int64_t first, int64_t last) {
    int64_t left_over = 0;
    for (size_t i = 0; i < count; ++i) {
      const int64_t own = jobs[i].*units;
      const int64_t begin = (first * own + left_over) / threads, end = (last * own + left_over) / threads;
      if (begin < end) function(jobs[i], begin, end);
      left_over = (left_over + own) % threads;
    }
  };
  if (threads == 1) {
    run(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, run);
  }
}

template <typename Job>
void run_batch(Job* jobs, size_t count, size_t bytes, const ExpertRows& rows, int64_t slots) {
  auto* memory = static_cast<char*>(scratch(Scratch::for_all_threads, bytes));
  int64_t tokens = 0, gathered = 0, scattered = 0;
  double threads = 0;  // that there is enough to do for
  for (size_t i = 0; i < count; ++i) {
    Job& job = jobs[i];
    job.memory = memory;
    memory += job.bytes;
    if (job.rows_to_gather > 0) RowsOf<typename Job::Problem>::set(job.problem, job.memory, rows.x_bytes);
    if (job.rows_to_scatter > 0) job.problem.y = job.memory + job.y_offset;
    tokens += job.tokens;
    gathered += job.rows_to_gather;
    scattered += job.rows_to_scatter;
    threads += static_cast<double>(job.tasks) / static_cast<double>(job.kernel->tasks_per_thread(job.problem));
  }
  if (gathered > 0) {
    for_all(jobs, count, &Job::rows_to_gather, gathered * rows.x_bytes / bytes_per_thread,
            [&](const Job& job, int64_t first, int64_t last) {
              for (int64_t i = first; i < last; ++i) {
                std::memcpy(job.memory + i * rows.x_bytes, rows.x + job.places[i] / slots * rows.x_stride_bytes,
                            static_cast<size_t>(rows.x_bytes));
              }
            });
  }
  for_all(jobs, count, &Job::parts, tokens * rows.x_bytes / bytes_per_thread,
          [](const Job& job, int64_t first, int64_t last) {
            job.kernel->prepare(job.problem, job.memory + job.prepared_offset, first, last);
          });
  for_all(jobs, count, &Job::tasks, static_cast<int64_t>(threads), [](const Job& job, int64_t first, int64_t last) {
    job.kernel->run(job.problem, job.memory + job.prepared_offset, first, last);
  });
  if (scattered > 0) {
    for_all(jobs, count, &Job::rows_to_scatter, scattered * rows.y_bytes / bytes_per_thread,
            [&](const Job& job, int64_t first, int64_t last) {
              for (int64_t i = first; i < last; ++i) {
                std::memcpy(rows.y + job.places[i] * rows.y_bytes, job.memory + job.y_offset + i * rows.y_bytes,
                            static_cast<size_t>(rows.y_bytes));
              }
            });
  }
}

template <typename Job>
void run_jobs(std::vector<Job>& jobs, const ExpertRows& rows, int64_t slots) {
  for (size_t first = 0; first < jobs.size();) {
    size_t last = first, bytes = 0;
    do {
      bytes += jobs[last].bytes;
      ++last;
    } while (last < jobs.size() && bytes + jobs[last].bytes <= most_bytes_of_batch);
    run_batch(&jobs[first], last - first, bytes, rows, slots);
    first = last;
  }
}

// Jobs for all places of all experts, each begun by `start(job, expert)`, which gives it a problem without rows and a
// kernel. Whether there is one for each.
template <typename Job, typename Start>
bool plan_jobs(const ExpertWeights& weights, const Routes& routes, const ExpertRows& rows, std::vector<Job>& jobs,
               const Start& start) {
  jobs.clear();
  size_t count = 0;
  for (int64_t expert = 0; expert < weights.count; ++expert) {
    count += static_cast<size_t>((routes.end_of(expert) - routes.begin_of(expert) + most_tokens_of_job - 1) /
                                 most_tokens_of_job);
  }
  jobs.reserve(count);  // problems point to what is in their job
  for (int64_t expert = 0; expert < weights.count; ++expert) {
    const int64_t end = routes.end_of(expert);
    for (int64_t begin = routes.begin_of(expert); begin < end; begin += most_tokens_of_job) {
      const std::optional<Weight> weight = weights.of(expert);
      if (!weight.has_value()) return false;
      Job& job = jobs.emplace_back();
      job.weight = *weight;
      job.places = &routes.places[static_cast<size_t>(begin)];
      job.tokens = std::min(end - begin, most_tokens_of_job);
      if (!start(job, expert)) return false;
      plan_job(job, rows, routes.slots);
    }
  }
  return true;
}

inline void zero_rows_of_nobody(const Routes& routes, int64_t experts, const ExpertRows& rows) {
  for (int64_t i = routes.begin_of(experts); i < routes.end_of(experts); ++i) {
    const int64_t place = routes.places[static_cast<size_t>(i)];
    std::memset(rows.y + place * rows.y_bytes, 0, static_cast<size_t>(rows.y_bytes));
  }
}

}  // namespace compressed_format
