def pytest_addoption(parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="Write the loss curves that were measured as the ones to keep to.")
