package runtime

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"distkit/runtime/internal/testenv"
)

// onOtherHost is the variable that tells the test binary that it runs where a host of another kind is made up, with runc alone.
const onOtherHost = "TEST_OTHER_HOST"

// Cgroup v2 is the only hierarchy on most hosts. There, too, a hundred containers leave nothing, one that is killed at any step or
// whose host was booted runs again, and what run has started ends with it.
func TestPureCgroupV2(t *testing.T) {
	testenv.Require(t, "root")
	testenv.Require(t, "runc")
	testenv.Require(t, "busybox")
	if os.Getenv(onOtherHost) != "" {
		return
	}
	tests := []string{"TestHundred", "TestKilledAtEveryStep", "TestBoot", "TestRunKilled"}
	c := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", `mount -t cgroup2 none /sys/fs/cgroup && exec "$0" "$@"`,
		os.Args[0], "-test.v", "-test.run=^("+strings.Join(tests, "|")+")$")
	c.Env = append(os.Environ(), onOtherHost+"=cgroup v2")
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	for _, name := range tests {
		if !strings.Contains(string(out), "--- PASS: "+name+"/runc") {
			t.Errorf("%s has not run:\n%s", name, out)
		}
	}
}
