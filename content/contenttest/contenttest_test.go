package contenttest_test

import (
	"os"
	"testing"

	"distkit/content"
	"distkit/content/contenttest"
)

func open(root string) (contenttest.Store, error) { return content.Open(root) }

func TestMain(m *testing.M) {
	contenttest.Main(open)
	os.Exit(m.Run())
}

func TestStore(t *testing.T) { contenttest.Run(t, open) }
