package runtime

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"distkit/runtime/internal/testenv"
	"distkit/runtime/spec"

	"golang.org/x/sys/unix"
)

func TestReadStats(t *testing.T) {
	for name, c := range map[string]struct {
		files map[string]string // content by hierarchy/file
		want  Stats
	}{
		"v1": {map[string]string{
			"cpuacct/cpuacct.usage":                           "123456789\n",
			"cpuacct/cpuacct.stat":                            "user 7\nsystem 5\n",
			"cpu/cpu.stat":                                    "nr_periods 1\nnr_throttled 1\nthrottled_time 99\n",
			"memory/memory.usage_in_bytes":                    "4096\n",
			"memory/memory.limit_in_bytes":                    "9223372036854771712\n",
			"memory/memory.stat":                              "inactive_file 1\ntotal_inactive_file 2\n",
			"memory/memory.oom_control":                       "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
			"pids/pids.current":                               "4\n",
			"pids/pids.max":                                   "max\n",
			"blkio/blkio.throttle.io_service_bytes_recursive": "8:0 Read 10\n8:0 Write 20\n8:16 Read 1\n8:0 Total 30\nTotal 31\n",
		}, Stats{CPU: 123456789, CPUUser: 70_000_000, CPUSystem: 50_000_000, Throttled: 99, Memory: 4096, Inactive: 2, Processes: 4, Read: 11, Written: 20, OOMKills: 3}},
		"v2": {map[string]string{
			"x/cpu.stat":       "usage_usec 10\nuser_usec 6\nsystem_usec 4\nthrottled_usec 2\n",
			"x/memory.current": "8192\n",
			"x/memory.max":     "65536\n",
			"x/memory.stat":    "anon 1\ninactive_file 5\n",
			"x/memory.events":  "low 0\noom_kill 1\n",
			"x/pids.current":   "2\n",
			"x/pids.max":       "100\n",
			"x/io.stat":        "8:0 rbytes=7 wbytes=8 rios=1 wios=1 dbytes=0 dios=0\n8:16 rbytes=1 wbytes=1\n",
		}, Stats{CPU: 10_000, CPUUser: 6000, CPUSystem: 4000, Throttled: 2000, Memory: 8192, MemoryLimit: 65536, Inactive: 5, Processes: 2, ProcessMost: 100, Read: 8, Written: 9, OOMKills: 1}},
		"nothing": {map[string]string{"x/cgroup.procs": ""}, Stats{}},
	} {
		root := t.TempDir()
		seen := map[string]bool{}
		var dirs []string
		for f, content := range c.files {
			testenv.Write(t, filepath.Join(root, f), content)
			if d := filepath.Join(root, filepath.Dir(f)); !seen[d] {
				seen[d] = true
				dirs = append(dirs, d)
			}
		}
		if got := readStats(dirs); got != c.want {
			t.Errorf("%s: %+v, not %+v", name, got, c.want)
		}
	}
}

func TestParseSignal(t *testing.T) {
	for s, want := range map[string]int{"TERM": 15, "SIGKILL": 9, "hup": 1, "10": 10, "RTMIN": 34, "SIGRTMIN+1": 35, "RTMAX-1": 63, "64": 64} {
		if got, err := spec.ParseSignal(s); err != nil || int(got) != want {
			t.Errorf("%s: %d %v", s, got, err)
		}
	}
	for _, s := range []string{"", "0", "65", "-1", "TERMINATE", "RTMIN1", "RTMAX+1", "RTMIN-1", "SIG"} {
		if got, err := spec.ParseSignal(s); err == nil {
			t.Errorf("%q: %d", s, got)
		}
	}
}

// A cgroup of version 2, also on a host with version 1, is counted, frozen, thawed and emptied.
func TestCgroupV2(t *testing.T) {
	testenv.Require(t, "root")
	root := ""
	for _, dir := range []string{cgroupRoot, filepath.Join(cgroupRoot, "unified")} {
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			root = dir
		}
	}
	if root == "" {
		t.Skip("this host has no cgroup v2")
	}
	dir := filepath.Join(root, fmt.Sprintf("test-v2-%d", os.Getpid()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	all := []string{dir}
	defer func() {
		removeCgroups(all)
		if _, err := os.Stat(dir); err == nil {
			t.Error("the cgroup is left")
		}
	}()
	c := exec.Command("sh", "-c", "read x; while :; do :; done")
	in, err := c.StdinPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		thaw(all)
		_ = c.Process.Kill()
		_ = c.Wait()
	}()
	testenv.Write(t, filepath.Join(dir, "cgroup.procs"), strconv.Itoa(c.Process.Pid))
	before := readStats(all)
	if _, err := in.Write([]byte("go\n")); err != nil {
		t.Fatal(err)
	}
	var s Stats
	until(t, "processor time", func() bool { s = readStats(all); return s.CPU >= before.CPU+20_000_000 })
	if s.CPU < s.CPUUser || s.CPUUser+s.CPUSystem == 0 || s.CPU > uint64(time.Hour) {
		t.Errorf("%+v", s)
	}
	// Enabled controllers, if any, have files of their own.
	for file, got := range map[string]uint64{"memory.current": s.Memory, "pids.current": s.Processes} {
		if _, err := os.Stat(filepath.Join(dir, file)); (err == nil) != (got > 0) {
			t.Errorf("%s: %v, and %d", file, err, got)
		}
	}
	if got := processes(all); !slices.Equal(got, []int{c.Process.Pid}) {
		t.Errorf("processes %v", got)
	}
	if frozen(all) {
		t.Error("it is frozen")
	}
	testenv.Write(t, filepath.Join(dir, "cgroup.freeze"), "1")
	if !frozen(all) {
		t.Error("it is not frozen")
	}
	thaw(all)
	if frozen(all) {
		t.Error("it is frozen still")
	}
}
