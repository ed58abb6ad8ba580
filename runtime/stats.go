package runtime

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Stats are a container's use of resources, by its cgroups. Values that the kernel does not count are 0.
type Stats struct {
	ID          string    `json:"id"`
	Time        time.Time `json:"time"`
	CPU         uint64    `json:"cpu"`                // nanoseconds of processor time
	CPUUser     uint64    `json:"cpuUser"`            // of CPU, in user mode
	CPUSystem   uint64    `json:"cpuSystem"`          // of CPU, in the kernel
	Throttled   uint64    `json:"throttled"`          // nanoseconds in which limits kept it from running
	Memory      uint64    `json:"memory"`             // bytes
	Inactive    uint64    `json:"inactiveFile"`       // of Memory: file cache that can be dropped at once
	MemoryLimit uint64    `json:"memoryLimit"`        // 0 means no limit
	Processes   uint64    `json:"processes"`          // including threads
	ProcessMost uint64    `json:"processLimit"`       // 0 means no limit
	Read        uint64    `json:"read"`               // bytes read from block devices
	Written     uint64    `json:"written"`            // bytes written to block devices
	OOMKills    uint64    `json:"oomKills,omitempty"` // processes killed by the OOM killer
}

// Stats returns a container's use of resources, by cgroup v1 or v2. FailedPrecondition: it has no process.
func (c *Container) Stats() (Stats, error) {
	l, err := c.proc("").live()
	if err == nil && len(l.state.Cgroups) == 0 {
		err = failed("container %s has no cgroups of its own", c.ID)
	}
	if err != nil {
		return Stats{}, fmt.Errorf("stats: %w", err)
	}
	s := readStats(l.state.Cgroups)
	s.ID, s.Time = c.ID, time.Now().UTC()
	return s, nil
}

// cgroupFile returns the content of a file of the cgroups, or "" if none of them has it.
func cgroupFile(cgroups []string, name string) string {
	if d, ok := hierarchy(cgroups, name); ok {
		b, _ := os.ReadFile(filepath.Join(d, name))
		return string(b)
	}
	return ""
}

// oomKills returns how many processes in the cgroups the OOM killer has killed.
func oomKills(cgroups []string) uint64 {
	if events := cgroupFile(cgroups, "memory.events"); events != "" {
		return keyed(events)["oom_kill"]
	}
	return keyed(cgroupFile(cgroups, "memory.oom_control"))["oom_kill"]
}

func readStats(cgroups []string) (s Stats) {
	file := func(name string) string { return cgroupFile(cgroups, name) }
	// cgroup v2, or else v1
	if cpu := keyed(file("cpu.stat")); cpu["usage_usec"] > 0 || file("cpuacct.usage") == "" {
		s.CPU, s.CPUUser, s.CPUSystem = cpu["usage_usec"]*1000, cpu["user_usec"]*1000, cpu["system_usec"]*1000
		s.Throttled = cpu["throttled_usec"] * 1000
	} else {
		s.CPU = count(file("cpuacct.usage"))
		ticks := keyed(file("cpuacct.stat"))
		s.CPUUser, s.CPUSystem = ticks["user"]*10_000_000, ticks["system"]*10_000_000
		s.Throttled = cpu["throttled_time"]
	}
	memory := keyed(file("memory.stat"))
	if current := file("memory.current"); current != "" {
		s.Memory, s.MemoryLimit, s.Inactive = count(current), count(file("memory.max")), memory["inactive_file"]
	} else {
		s.Memory, s.Inactive = count(file("memory.usage_in_bytes")), memory["total_inactive_file"]
		// Without a limit, the file has the largest multiple of a page that the kernel can count.
		if s.MemoryLimit = count(file("memory.limit_in_bytes")); s.MemoryLimit >= 1<<62 {
			s.MemoryLimit = 0
		}
	}
	s.OOMKills = oomKills(cgroups)
	s.Processes, s.ProcessMost = count(file("pids.current")), count(file("pids.max"))
	if io := file("io.stat"); io != "" {
		for _, word := range strings.Fields(io) {
			switch k, v, _ := strings.Cut(word, "="); k {
			case "rbytes":
				s.Read += count(v)
			case "wbytes":
				s.Written += count(v)
			}
		}
		return s
	}
	for line := range strings.Lines(file("blkio.throttle.io_service_bytes_recursive")) {
		switch f := strings.Fields(line); {
		case len(f) != 3:
		case f[1] == "Read":
			s.Read += count(f[2])
		case f[1] == "Write":
			s.Written += count(f[2])
		}
	}
	return s
}

// count parses a number. "max" and malformed text are 0.
func count(s string) uint64 {
	n, _ := strconv.ParseUint(strings.TrimSpace(s), 10, 64)
	return n
}

// keyed parses lines of a key and a number.
func keyed(s string) map[string]uint64 {
	m := map[string]uint64{}
	for line := range strings.Lines(s) {
		if k, v, ok := strings.Cut(line, " "); ok {
			m[k] = count(v)
		}
	}
	return m
}
