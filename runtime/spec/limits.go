package spec

import (
	"slices"
	"strconv"
	"strings"

	"distkit/errclass"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Limits restrict a container's use of the host. The zero value means no limits.
type Limits struct {
	Memory     int64   // bytes; 0 and -1 mean no limit
	MemorySwap int64   // bytes of memory and swap together; -1 means no limit, 0 means twice Memory if the kernel can limit swap
	CPUs       float64 // processor time, in processors
	CPUShares  uint64  // weight against others' processor time; the usual weight is 1024
	CPUSet     string  // processors that may be used, such as 0-2,5
	MemSet     string  // memory nodes that may be used, such as 0-2,5
	Pids       int64   // processes and threads; -1 means no limit
}

// minMemory is docker's minimum: with less, the runtime can't start a process.
const minMemory = 6 << 20

// Resources returns the limits for a runtime; fields without a limit are nil. InvalidArgument: docker would refuse the
// limit too. NotImplemented: the kernel can't limit swap.
func (l Limits) Resources(h Host) (*specs.LinuxResources, error) {
	r := &specs.LinuxResources{}
	switch {
	case l.Memory < -1, l.Memory > 0 && l.Memory < minMemory:
		return nil, invalid("a memory limit of %d bytes: 6m is the least", l.Memory)
	case l.MemorySwap < -1:
		return nil, invalid("a limit of %d bytes of memory and swap is none", l.MemorySwap)
	case l.MemorySwap > 0 && (l.MemorySwap < l.Memory || l.Memory < 0):
		return nil, invalid("the limit of memory and swap together is below that of memory")
	case l.MemorySwap > 0 && !h.LimitsSwap:
		return nil, errclass.Errorf(errdefs.ErrNotImplemented, "this host's kernel can't limit swap")
	case l.CPUs != 0 && !(l.CPUs >= 0.01 && l.CPUs <= 1<<20):
		return nil, invalid("%v processors are not between 0.01 and 1048576", l.CPUs)
	case l.CPUShares != 0 && (l.CPUShares < 2 || l.CPUShares > 1<<18):
		return nil, invalid("a processor weight of %d is not between 2 and 262144", l.CPUShares)
	case l.Pids < -1:
		return nil, invalid("%d is no number of processes", l.Pids)
	}
	var memory specs.LinuxMemory
	if l.Memory != 0 {
		memory.Limit = &l.Memory
	}
	if swap := l.MemorySwap; h.LimitsSwap {
		if swap == 0 {
			swap = max(2*l.Memory, -1) // a limit on memory alone has little effect on a host with swap
		}
		if swap != 0 {
			memory.Swap = &swap
		}
	}
	if memory != (specs.LinuxMemory{}) {
		r.Memory = &memory
	}
	for _, s := range []struct{ what, list, have string }{{"processors", l.CPUSet, h.CPUSet}, {"memory nodes", l.MemSet, h.MemSet}} {
		if err := checkSet(s.what, s.list, s.have); err != nil {
			return nil, err
		}
	}
	cpu := specs.LinuxCPU{Cpus: l.CPUSet, Mems: l.MemSet}
	if l.CPUs > 0 {
		period := uint64(100000)
		quota := int64(l.CPUs * float64(period))
		cpu.Period, cpu.Quota = &period, &quota
	}
	if l.CPUShares > 0 {
		cpu.Shares = &l.CPUShares
	}
	if cpu != (specs.LinuxCPU{}) {
		r.CPU = &cpu
	}
	if l.Pids != 0 {
		r.Pids = &specs.LinuxPids{Limit: &l.Pids}
	}
	return r, nil
}

// checkSet checks a list of processors or memory nodes, such as 0-2,5. have is the host's list, or "" if unknown.
func checkSet(what, list, have string) error {
	wanted, ok := parseSet(list)
	if !ok {
		return invalid("%s %q: want numbers and ranges, such as 0-2,5", what, list)
	}
	all, _ := parseSet(have)
	for _, w := range wanted {
		if have != "" && !slices.ContainsFunc(all, func(a span) bool { return a.first <= w.first && w.last <= a.last }) {
			return invalid("%s %s: this host has %s", what, list, have)
		}
	}
	return nil
}

// span is a range of processors or memory nodes.
type span struct{ first, last int }

// parseSet parses a list of numbers and ranges. ok is false if list is malformed. An empty list has no spans.
func parseSet(list string) (all []span, ok bool) {
	const most = 1 << 16 // above the kernel's largest NR_CPUS
	if list == "" {
		return nil, true
	}
	for _, part := range strings.Split(list, ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		a, aerr := strconv.ParseUint(first, 10, 31)
		b, berr := strconv.ParseUint(last, 10, 31)
		if aerr != nil || berr != nil || a > b || b >= most || len(all) == most {
			return nil, false
		}
		all = append(all, span{int(a), int(b)})
	}
	return all, true
}
