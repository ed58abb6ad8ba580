package runtime

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"distkit/runtime/internal/testenv"
)

// onOtherHost is an environment variable. The test binary sees it set when it runs on a simulated host of another
// kind, which has runc only.
const onOtherHost = "TEST_OTHER_HOST"

// Most hosts have only cgroup v2. The tests for many containers, killed steps, boots and killed runs pass there too.
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
