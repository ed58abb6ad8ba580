package specflags

import (
	"fmt"

	"distkit/runtime/spec"

	"github.com/spf13/pflag"
)

// Limits are the values of the flags that limit a container's use of the host.
type Limits struct {
	l                  spec.Limits
	memory, memorySwap string
}

// RegisterLimits registers these flags.
func RegisterLimits(f *pflag.FlagSet) *Limits {
	w := &Limits{}
	f.Uint64Var(&w.l.CPUShares, "cpu-shares", 0, "the `WEIGHT` of its processor time against others', 1024 being usual")
	f.Float64Var(&w.l.CPUs, "cpus", 0, "limit to `N` processors' time, 1.5 for example")
	f.StringVar(&w.l.CPUSet, "cpuset-cpus", "", "the processors that it may use, a `LIST` such as 0-2,5")
	f.StringVar(&w.l.MemSet, "cpuset-mems", "", "the memory nodes that it may use, a `LIST`")
	f.StringVarP(&w.memory, "memory", "m", "", "limit memory to `SIZE`, 512m for example; -1 is no limit")
	f.StringVar(&w.memorySwap, "memory-swap", "", "limit memory and swap together to `SIZE`; -1 is no limit (default: twice --memory)")
	f.Int64Var(&w.l.Pids, "pids", 0, "limit to `N` processes and threads; -1 is no limit")
	return w
}

// Get returns the limits that the flags set.
func (w *Limits) Get() (spec.Limits, error) {
	l := w.l
	for _, size := range []struct {
		flag, value string
		to          *int64
	}{{"memory", w.memory, &l.Memory}, {"memory-swap", w.memorySwap, &l.MemorySwap}} {
		if size.value == "" {
			continue
		}
		n, err := spec.ParseLimit(size.value)
		if err != nil {
			return l, fmt.Errorf("--%s: %w", size.flag, err)
		}
		*size.to = n
	}
	return l, nil
}
