package spec

import (
	"encoding/json"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
)

// Limits become what docker makes of the same flags. Limits that docker refuses are refused.
func TestLimits(t *testing.T) {
	t.Parallel()
	host := Host{LimitsSwap: true, CPUSet: "0-3,6", MemSet: "0"}
	for _, c := range []struct {
		l    Limits
		want string // memory, cpu and pids, or the error
	}{
		{Limits{}, `null null null`},
		{Limits{Memory: 8 << 20}, `{"limit":8388608,"swap":16777216} null null`},
		{Limits{Memory: 8 << 20, MemorySwap: 8 << 20}, `{"limit":8388608,"swap":8388608} null null`},
		{Limits{Memory: 8 << 20, MemorySwap: -1}, `{"limit":8388608,"swap":-1} null null`},
		{Limits{Memory: -1, MemorySwap: -1}, `{"limit":-1,"swap":-1} null null`},
		{Limits{Memory: -1}, `{"limit":-1,"swap":-1} null null`},
		{Limits{CPUs: 1.5, CPUShares: 512, CPUSet: "0-2,6", MemSet: "0"}, `null {"shares":512,"quota":150000,"period":100000,"cpus":"0-2,6","mems":"0"} null`},
		{Limits{Pids: 7}, `null null {"limit":7}`},
		{Limits{Pids: -1}, `null null {"limit":-1}`},
		{Limits{Memory: 6<<20 - 1}, "a memory limit of 6291455 bytes: 6m is the least: invalid argument"},
		{Limits{Memory: 8 << 20, MemorySwap: 7 << 20}, "the limit of memory and swap together is below that of memory: invalid argument"},
		{Limits{CPUs: 0.001}, "0.001 processors are not between 0.01 and 1048576: invalid argument"},
		{Limits{CPUs: -1}, "-1 processors are not between 0.01 and 1048576: invalid argument"},
		{Limits{CPUShares: 1}, "a processor weight of 1 is not between 2 and 262144: invalid argument"},
		{Limits{CPUSet: "4"}, "processors 4: this host has 0-3,6: invalid argument"},
		{Limits{CPUSet: "3-6"}, "processors 3-6: this host has 0-3,6: invalid argument"},
		{Limits{CPUSet: "2-1"}, `processors "2-1": want numbers and ranges, such as 0-2,5: invalid argument`},
		{Limits{CPUSet: "0,,1"}, `processors "0,,1": want numbers and ranges, such as 0-2,5: invalid argument`},
		{Limits{MemSet: "1"}, "memory nodes 1: this host has 0: invalid argument"},
		{Limits{Pids: -2}, "-2 is no number of processes: invalid argument"},
	} {
		r, err := c.l.Resources(host)
		got := ""
		if err != nil {
			got = err.Error() + ": invalid argument"
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("%+v: %v is no InvalidArgument", c.l, err)
			}
		} else {
			for i, v := range []any{r.Memory, r.CPU, r.Pids} {
				b, err := json.Marshal(v)
				if err != nil {
					t.Fatal(err)
				}
				got += []string{"", " ", " "}[i] + string(b)
			}
		}
		if got != c.want {
			t.Errorf("%+v:\n%s, want\n%s", c.l, got, c.want)
		}
	}
	host.LimitsSwap = false
	if r, err := (Limits{Memory: 8 << 20}).Resources(host); err != nil || r.Memory.Swap != nil {
		t.Errorf("a kernel that can't limit swap: %+v, %v", r, err)
	}
	if _, err := (Limits{Memory: 8 << 20, MemorySwap: 9 << 20}).Resources(host); !errdefs.IsNotImplemented(err) {
		t.Errorf("a limit of swap where the kernel has none: %v", err)
	}
	if _, err := New(&Image{}, Options{Args: []string{"x"}, Limits: Limits{MemorySwap: 8 << 20}, Host: Host{LimitsSwap: true}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a limit of swap without one of memory: %v", err)
	}
}

// Flags for the process, other than limits.
func TestProcessFlags(t *testing.T) {
	t.Parallel()
	adjustment := 500
	s, err := New(&Image{}, Options{Args: []string{"x"}, User: "7:8", GroupAdd: []string{"9", "8", "0"}, OOMScoreAdj: &adjustment, ShmSize: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(s.Process.User.AdditionalGids, []uint32{8, 9, 0}) || *s.Process.OOMScoreAdj != 500 {
		t.Errorf("%+v", s.Process)
	}
	for _, m := range s.Mounts {
		if m.Destination == "/dev/shm" && !slices.Contains(m.Options, "size=1048576") {
			t.Errorf("%+v", m)
		}
	}
	adjustment = 1001
	for _, o := range []Options{{OOMScoreAdj: &adjustment}, {GroupAdd: []string{""}}, {GroupAdd: []string{"wheel"}}, {GroupAdd: []string{"4294967295"}}, {ShmSize: -1}} {
		o.Args = []string{"x"}
		if _, err := New(&Image{}, o); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", o, err)
		}
	}
}
