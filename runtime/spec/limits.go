package spec

import (
	"slices"
	"strconv"
	"strings"

	"distkit/errclass"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Limits are what a container may use of its host. The zero value is no limit.
type Limits struct {
	Memory     int64   // bytes; 0 and -1 are no limit
	MemorySwap int64   // bytes of memory and swap together; 0 is twice Memory where the kernel limits swap, -1 is no limit
	CPUs       float64 // processors' time
	CPUShares  uint64  // the weight against others' processor time, 1024 being usual
	CPUSet     string  // the processors, such as 0-2,5
	MemSet     string  // the memory nodes, likewise
	Pids       int64   // processes and threads; -1 is no limit
}

// minMemory is docker's: with less the runtime can't start a process.
const minMemory = 6 << 20

// Resources returns the limits as a runtime takes them; fields are nil where there is no limit. The error is InvalidArgument
// for a limit that docker refuses too, and NotImplemented if the kernel can't limit swap.
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
			swap = max(2*l.Memory, -1) // on a host with swap a limit of memory alone limits little
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

// checkSet checks a list of processors or memory nodes, such as 0-2,5. Have lists those of the host, "" if that is not known.
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

// parseSet parses a list of numbers and ranges; ok is false if it is none. An empty list has no spans.
func parseSet(list string) (all []span, ok bool) {
	const most = 1 << 16 // of processors: above the kernel's NR_CPUS
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
